"""Which smoothing a run's predictions have: given, or chosen on its validation split."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.train.data import load_split
from vaflow.train.evaluate import featureless
from vaflow.train.runs import load_run
from vaflow.train.smoothing import FILTERS, Smoothing, choose_width, write_smoothing
from vaflow.train.training import read_for

NO_SMOOTHING = "none"


def set_smoothing(
    run: Path, cache: Cache, kind: str, seconds: float | None = None, *, device: str = "auto", show: bool = False
) -> Smoothing | None:
    """Choose how a run's traces are smoothed from now on, and keep it beside the run.

    Args:
        run: a finished run.
        cache: what it was trained on.
        kind: "mean", "savgol", or "none", which forgets an earlier choice.
        seconds: width; None: the one with the best mean CCC on the run's validation split.
        device: "auto", "cpu" or "cuda[:N]".
        show: progress bars.

    Raises:
        UsageError: an unknown kind, a width that is not one, or the run is not one.
        FingerprintError: the cache's streams were made with other settings than the run's.
    """
    if kind not in (NO_SMOOTHING, *FILTERS):
        raise UsageError(explain("Unknown smoothing", got=kind, choices=(NO_SMOOTHING, *FILTERS)))
    target = choose_device(device)
    trained = replace(load_run(run, target), smoothing=None)
    chosen = None
    if kind != NO_SMOOTHING and seconds is not None:
        chosen = Smoothing(kind, seconds)
    elif kind != NO_SMOOTHING:
        split = trained.record.config.val_split
        windows = read_for(run, trained.record, cache, partial(load_split, cache, split, device=target, show=show))
        lost = {clip.item for clip in featureless(windows)}
        traces = [trace for trace in trained.traces(windows) if trace.clip.item not in lost]
        chosen = choose_width(traces, kind, split)
    write_smoothing(Path(run), chosen)
    return chosen
