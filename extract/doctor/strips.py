"""A clip's whole length in a few bytes: which stretches of it have something and which lack it."""

import numpy as np
from numpy.typing import NDArray

BINS = 240  # of a strip


def strip(times: NDArray[np.float64], flags: NDArray[np.bool_], duration: float) -> bytes:
    """[BINS] uint8: the share of true flags in each of `BINS` equal parts of the clip; a flag holds until the next.

    Args:
        times: [N] seconds, ascending, N >= 1.
        flags: [N].
        duration: seconds of the whole.
    """
    position = np.clip((times * (BINS / duration)).astype(np.int64), 0, BINS - 1)
    count = np.bincount(position, minlength=BINS)
    middles = (np.arange(BINS) + 0.5) * (duration / BINS)
    held = flags[np.clip(np.searchsorted(times, middles, "right") - 1, 0, None)]
    share = np.bincount(position, flags, minlength=BINS) / np.maximum(count, 1)
    return bytes(np.rint(255 * np.where(count > 0, share, held)).astype(np.uint8))


def runs(flags: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))
