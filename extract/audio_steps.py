"""Masks of audio: which filter-bank frames, and which steps of a window, have audio."""

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders import logmel
from vaflow.timeline import Bools, Floats, Grid, Ints

HOP = logmel.HOP / logmel.RATE  # seconds between two filter-bank frames
FRAME = logmel.FRAME / logmel.RATE  # seconds that one covers
_SLACK = HOP / 2  # resampling rounds the ends of the audio by a fraction of a sample


def covered_frames(frames: int, covered: tuple[tuple[float, float], ...]) -> Bools:
    """[F] True where all samples of a filter-bank frame came from the file."""
    first = np.arange(frames) * HOP
    valid = np.zeros(frames, bool)
    for start, stop in covered:
        valid |= (first >= start - _SLACK) & (first + FRAME <= stop + _SLACK)
    return valid


def step_valid(valid: Bools, starts: Floats, window: float, steps: int, duration: float) -> Bools:
    """[W, S] True where at least half of the frames under a step are valid; frames after the clip do not count."""
    sums = np.concatenate([[0], np.cumsum(valid)])
    edges = _edges(starts, window, steps)
    counts = np.diff(sums[np.clip(edges, 0, len(valid))], axis=1)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    result: NDArray[np.bool_] = (inside > 0) & (counts * 2 >= inside)
    return result


def ends_in_a_short_step(grid: Grid, steps: int, duration: float) -> bool:
    """Whether less than half of some step lies within the clip; reading version 2 marked such steps as missing."""
    edges = _edges(grid.seconds(grid.starts(duration)), grid.window, steps)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    return bool(((inside > 0) & (inside * 2 < np.diff(edges, axis=1))).any())


def _edges(starts: Floats, window: float, steps: int) -> Ints:
    """[W, S + 1] numbers of the frames at which the steps begin and end."""
    return np.rint((starts[:, None] + np.arange(steps + 1) * window / steps) / HOP).astype(np.int64)


def _frames_within(duration: float) -> int:
    """Number of frames that end within a clip."""
    return max(0, int((duration - FRAME + _SLACK) / HOP) + 1)
