"""Annotations that come as one file per dimension, and how two of them become one."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels.clock import at_times
from vaflow.datasets.labels.text import TARGETS
from vaflow.timeline import median_interval, nearest

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
