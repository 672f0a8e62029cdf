"""Put annotations on the frame clock, and merge annotations that have one file per dimension."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation
from vaflow.datasets.text import TARGETS
from vaflow.timeline import extend, median_interval, nearest

CLOCK_GAP = 0.25  # seconds between the time of a frame and the time that its label states; more is a contradiction
LATE_LABELS = 1.0  # seconds that time-stamped labels may continue after the clip
USUAL_ROWS = (-3, 2)  # annotation rows minus frames, as in Aff-Wild2
_PAUSE = 1.5  # distance of two rows, in intervals, above which there is a gap


def on_clock(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Labels at the times of the video's frames.

    Row k of a frame-numbered annotation belongs to frame `frame[k]`, whatever its time; rows beyond the last frame
    continue at the frames' median interval. With time-stamped rows, a frame takes the nearest row, of two equally near
    ones the earlier: within half a label interval, or within a whole one between two rows, so that irregular stamps
    leave no holes. Nothing is interpolated or extrapolated. Without frames (no video), time-stamped rows keep their
    own times.

    Args:
        annotation: the labels, or None.
        frame_times: [N] seconds, ascending: presentation times of all frames.

    Returns:
        time [R] float64 seconds; value [R, 2] float32, NaN where not annotated; valid [R, 2] bool.
        R is N, or for frame-numbered rows the last row's frame + 1 if that is more.
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


def clock_gap(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> float:
    """Largest distance in seconds of a frame's time from the one that the file states beside its number; 0 without."""
    if annotation is None or annotation.frame is None or annotation.stated is None:
        return 0.0
    inside = (annotation.frame < len(frame_times)) & np.isfinite(annotation.stated)
    return float(np.abs(frame_times[annotation.frame[inside]] - annotation.stated[inside]).max(initial=0.0))


def clock_problem(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> str:
    """Why labels may not belong to a clip, as a code of `vaflow check`; "" if nothing speaks against it.

    Args:
        annotation: the labels, or None.
        frame_times: [N] seconds, ascending; of audio alone, its clock.

    Returns:
        "labels-outlast": times continue after the clip; "two-clocks": the columns `frame` and `time` contradict each
        other; "row-count": there are more or fewer rows than usual for the number of frames.
    """
    if annotation is None or not frame_times.size:
        return ""
    if annotation.time is not None:
        end = float(frame_times[-1]) + median_interval(frame_times)
        return "labels-outlast" if annotation.time[-1] - end > LATE_LABELS else ""
    if clock_gap(annotation, frame_times) > CLOCK_GAP:
        return "two-clocks"
    frame = annotation.frame
    last = len(annotation.value) if frame is None else int(frame[-1]) + 1
    in_a_row = frame is None or np.array_equal(frame, np.arange(len(frame)))
    more = last - frame_times.size
    return "row-count" if more > USUAL_ROWS[1] or (in_a_row and more < USUAL_ROWS[0]) else ""


def at_times(rows: NDArray[np.float64], value: NDArray[np.float32], times: NDArray[np.float64]) -> NDArray[np.float32]:
    """[T, K] value of the nearest row at every time, NaN where no row is near enough."""
    interval = median_interval(rows, default=median_interval(times))
    index = nearest(rows, times)
    within = (times >= rows[0]) & (times <= rows[-1])
    # Times such as 0.1 are not exact in binary: a tolerance of a millionth of an interval decides ties.
    reach = np.where(within, interval, interval / 2) * (1 + 1e-6)
    near = np.abs(rows[index] - times) <= reach
    return np.where(near[:, None], value[index], np.float32(np.nan)).astype(np.float32)


@dataclass(frozen=True)
class DimensionLabels:
    """One dimension of one clip: [N] seconds, ascending, and [N] values, NaN where not annotated."""

    time: NDArray[np.float64]
    value: NDArray[np.float32]


def merge_dimensions(dimensions: Mapping[str, DimensionLabels]) -> Annotation:
    """Valence and arousal (or one of them) on one clock.

    The clock is that of the longer dimension; rows of the other one that lie half an interval or more from all of its
    rows are added. At each of these times every dimension takes its nearest row, as frames do in `on_clock`.
    """
    targets = tuple(target for target in TARGETS if target in dimensions)
    time = max((dimensions[target].time for target in targets), key=len)
    apart = median_interval(time) / 2 * (1 - 1e-6)
    for target in targets:
        other = dimensions[target].time
        time = np.union1d(time, other[np.abs(time[nearest(time, other)] - other) > apart])
    value = np.full((time.size, 2), np.nan, np.float32)
    for target in targets:
        labels = dimensions[target]
        value[:, TARGETS.index(target)] = at_times(labels.time, labels.value[:, None], time)[:, 0]
    return Annotation(value=value, time=time, targets=targets)


def with_gaps(labels: DimensionLabels, breaks: NDArray[np.bool_]) -> DimensionLabels:
    """Labels with unannotated rows inserted at pauses, so that no frame of a pause takes a label from across it.

    Args:
        labels: [N] rows.
        breaks: [N - 1] whether a new segment begins after row k; if it follows at once there is no pause.
    """
    interval = median_interval(labels.time)
    pause = np.diff(labels.time)
    at = np.flatnonzero(breaks & (pause > _PAUSE * interval))
    first, last = labels.time[at], labels.time[at + 1]
    short = pause[at] < (_PAUSE + 1) * interval  # room for one row only
    added = np.concatenate([((first + last) / 2)[short], (first + interval)[~short], (last - interval)[~short]])
    time = np.concatenate([labels.time, added])
    value = np.concatenate([labels.value, np.full(added.size, np.nan, np.float32)])
    order = np.argsort(time, kind="stable")
    return DimensionLabels(time[order], value[order])
