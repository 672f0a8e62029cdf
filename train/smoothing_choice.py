"""Choose a run's smoothing (a given width, or the best one on the validation split) and store it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.evaluate import Trace, featureless
from vaflow.train.runs import load_run, require_record, width_of
from vaflow.train.smoothing import FILTERS, Smoothing, candidate_widths, choose_width, write_smoothing
from vaflow.train.training import read_for
from vaflow.train.uncertainty import calibrate, write_calibration

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
    traces, config = _validation_traces(run, cache, None, device, show)
    return choose_width(traces, kind, config.val_split, candidate_widths(traces, config.grid.step))


def store_smoothing(
    run: Path, cache: Cache, smoothing: Smoothing | None, *, device: str = "auto", show: bool = False
) -> None:
    """Store a smoothing with a run, and calibrate the standard deviations of a run with a variance head for it.

    Raises:
        UsageError, FingerprintError: as `choose_smoothing`.
    """
    calibration = None
    if require_record(run).config.uncertainty != NO_SMOOTHING:
        traces, config = _validation_traces(run, cache, smoothing, device, show)
        calibration = calibrate(traces, config.val_split, width_of(smoothing))
    write_smoothing(run, smoothing)
    if calibration is not None:
        write_calibration(run, calibration)


def _validation_traces(
    run: Path, cache: Cache, smoothing: Smoothing | None, device: str, show: bool
) -> tuple[Sequence[Trace], TrainConfig]:
    """Traces of a run on its validation split, not calibrated, of the clips with features; and its settings."""
    target = choose_device(device)
    trained = replace(load_run(run, target), smoothing=smoothing)
    config = trained.record.config
    read = partial(load_split, cache, config.val_split, device=target, show=show)
    windows = read_for(run, trained.record, cache, read)
    lost = {clip.item for clip in featureless(windows)}
    return [trace for trace in trained.raw_traces(windows) if trace.clip.item not in lost], config
