"""Choice of a run's smoothing: a given width, or the best one on the validation split."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.train.data import load_split
from vaflow.train.evaluate import featureless
from vaflow.train.runs import load_run
from vaflow.train.smoothing import FILTERS, Smoothing, candidate_widths, choose_width
from vaflow.train.training import read_for

NO_SMOOTHING = "none"


def choose_smoothing(
    run: Path, cache: Cache, kind: str, seconds: float | None = None, *, device: str = "auto", show: bool = False
) -> Smoothing | None:
    """Choose a smoothing for a run's traces; nothing is stored.

    Args:
        run: a finished run.
        cache: what it was trained on.
        kind: "mean", "savgol", or "none".
        seconds: width; None: the one with the best mean CCC on the run's validation split.
        device: "auto", "cpu" or "cuda[:N]".
        show: progress bars.

    Returns:
        None for "none".

    Raises:
        UsageError: an unknown kind, a negative width, or not a run.
        FingerprintError: the cache's streams were made with other settings than the run's.
    """
    if kind not in (NO_SMOOTHING, *FILTERS):
        raise UsageError(explain("Unknown smoothing", got=kind, choices=(NO_SMOOTHING, *FILTERS)))
    if kind == NO_SMOOTHING:
        return None
    if seconds is not None:
        return Smoothing(kind, seconds)
    target = choose_device(device)
    trained = replace(load_run(run, target), smoothing=None)
    config = trained.record.config
    read = partial(load_split, cache, config.val_split, device=target, show=show)
    windows = read_for(run, trained.record, cache, read)
    lost = {clip.item for clip in featureless(windows)}
    traces = [trace for trace in trained.traces(windows) if trace.clip.item not in lost]
    return choose_width(traces, kind, config.val_split, candidate_widths(traces, config.grid.step))
