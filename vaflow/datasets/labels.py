"""Annotations on the clock of a video's frames.

Annotations that come as one file per dimension, and how two of them become one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation
from vaflow.datasets.text import TARGETS
from vaflow.timeline import extend, median_interval, nearest


def on_clock(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Labels on the clock of the video's frames.

    Row k of a frame-numbered annotation belongs to frame `frame[k]`, whatever its time; rows beyond the last frame go
    on at the frames' median interval. With time-stamped rows, a frame takes the row nearest to it, of two equally
    near ones the earlier, if it is at most half a label interval away; between two rows at most a whole one, so that
    unsteady stamps leave no holes. Nothing is interpolated, and nothing is made up beyond the first and last row.
    Without any frame (no video), time-stamped rows keep their own times.

    Args:
        annotation: the labels, or None.
        frame_times: [N] seconds, ascending: presentation times of all frames.

    Returns:
        time [R] float64 seconds; value [R, 2] float32, NaN where not annotated; valid [R, 2] bool.
        R is N, or for frame-numbered rows the last row's frame + 1 where that is more.
    """
    times = np.asarray(frame_times, np.float64)
    if annotation is None:
        value = np.full((times.size, 2), np.nan, np.float32)
    elif annotation.time is not None:
        times = times if times.size else annotation.time
        value = at_times(annotation.time, annotation.value, times)
    else:
        frame = np.arange(len(annotation.value)) if annotation.frame is None else annotation.frame
        times = extend(times, int(frame[-1]) + 1 if frame.size else 0)
        value = np.full((times.size, 2), np.nan, np.float32)
        value[frame] = annotation.value
    return {"time": times, "value": value, "valid": np.isfinite(value)}


def at_times(rows: NDArray[np.float64], value: NDArray[np.float32], times: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest row's value at every time, NaN where no row is near enough."""
    interval = median_interval(rows, default=median_interval(times))
    index = nearest(rows, times)
    within = (times >= rows[0]) & (times <= rows[-1])
    # A stamp such as 0.1 is not exact in binary: a millionth of an interval decides nothing.
    reach = np.where(within, interval, interval / 2) * (1 + 1e-6)
    near = np.abs(rows[index] - times) <= reach
    return np.where(near[:, None], value[index], np.float32(np.nan)).astype(np.float32)


_JUMP = 1.5  # intervals between two rows from which on there is a gap


@dataclass(frozen=True)
class Trace:
    """One dimension of one clip: [N] seconds, ascending, and [N] values, NaN where not annotated."""

    time: NDArray[np.float64]
    value: NDArray[np.float32]


def merge(traces: Mapping[str, Trace]) -> Annotation:
    """Valence and arousal (or one of them) on one clock.

    The clock is that of the longer trace; rows of the other one that lie half an interval or more from all of its
    rows are added. At each of these times every dimension takes its nearest row, as frames do in `on_clock`.
    """
    targets = tuple(target for target in TARGETS if target in traces)
    longest = max((traces[target] for target in targets), key=lambda trace: trace.time.size)
    time = longest.time
    apart = median_interval(time) / 2 * (1 - 1e-6)
    for target in targets:
        other = traces[target].time
        time = np.union1d(time, other[np.abs(time[nearest(time, other)] - other) > apart])
    value = np.full((time.size, 2), np.nan, np.float32)
    for target in targets:
        trace = traces[target]
        value[:, TARGETS.index(target)] = at_times(trace.time, trace.value[:, None], time)[:, 0]
    return Annotation(value=value, time=time, targets=targets)


def with_gaps(trace: Trace, breaks: NDArray[np.bool_]) -> Trace:
    """Rows without annotation put where a trace pauses, so that no frame of a pause takes a label across it.

    Args:
        trace: [N] rows.
        breaks: [N - 1] whether a new stretch begins after row k. Where it follows at once there is no pause.
    """
    interval = median_interval(trace.time)
    pause = np.diff(trace.time)
    at = np.flatnonzero(breaks & (pause > _JUMP * interval))
    first, last = trace.time[at], trace.time[at + 1]
    short = pause[at] < (_JUMP + 1) * interval  # room for one row only
    added = np.concatenate([((first + last) / 2)[short], (first + interval)[~short], (last - interval)[~short]])
    time = np.concatenate([trace.time, added])
    value = np.concatenate([trace.value, np.full(added.size, np.nan, np.float32)])
    order = np.argsort(time, kind="stable")
    return Trace(time[order], value[order])
