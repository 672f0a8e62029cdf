"""What the labels of one clip are, in numbers, and the sums over several clips. Nothing is judged here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels import on_clock
from vaflow.extract.doctor.strips import runs, strip
from vaflow.timeline import median_interval

LEVEL_EDGES = (-1 / 3, 1 / 3)  # thirds of the range [-1, 1]
CELLS = 24  # of the map of labels, per dimension; a multiple of 3, so that no cell lies in two regions


@dataclass(frozen=True)
class LabelStats:
    """Sums over annotated frames, per dimension [2], per region [9] (3 * valence level + arousal level), and per cell.

    `density` [CELLS, CELLS] counts frames by valence (rows) and arousal (columns), both from -1 to 1.
    """

    count: NDArray[np.int64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    regions: NDArray[np.int64]
    density: NDArray[np.int64]


@dataclass(frozen=True)
class LabelFacts:
    """An annotation.

    Attributes:
        rows: rows of the file.
        clock: "row" (row k is frame k), "frame" or "time".
        end: 1 + the last row's frame number, or its time in seconds.
        runs: (first, last + 1) rows of every stretch without any annotation.
        half: rows annotated in one of two dimensions only.
        constant: dimensions that never change.
        frames: of the clip's clock: the video's, or rows where there are more.
        annotated: those of them that have a value in any dimension.
        stats: over these frames.
        strip: [BINS] uint8, the annotated share of each stretch of the clip, 255 for all of it.
    """

    rows: int
    clock: Literal["row", "frame", "time"]
    end: float
    runs: tuple[tuple[int, int], ...]
    half: int
    constant: tuple[str, ...]
    frames: int
    annotated: int
    stats: LabelStats
    strip: bytes


def label_facts(annotation: Annotation, times: NDArray[np.float64]) -> LabelFacts:
    """Measure an annotation; `times` [N] are the clip's frame times, none where the video cannot be used."""
    given = np.isfinite(annotation.value)
    value = annotation.value.astype(np.float64)
    constant = [name for name, column in zip(("valence", "arousal"), value.T, strict=True) if _is_constant(column)]
    clock: Literal["row", "frame", "time"] = "row"
    end = float(len(value))
    if annotation.time is not None:
        clock, end = "time", float(annotation.time[-1])
    elif annotation.frame is not None:
        clock = "row" if np.array_equal(annotation.frame, np.arange(len(value))) else "frame"
        end = float(annotation.frame[-1] + 1)
    on_frames = on_clock(annotation, times)
    clock_times, valid = on_frames["time"], np.asarray(on_frames["valid"].any(1))
    whole = float(clock_times[-1]) + median_interval(clock_times) if len(clock_times) else 0.0
    return LabelFacts(
        rows=len(value),
        clock=clock,
        end=end,
        runs=runs(np.asarray(np.isnan(value).all(1))),
        half=int((given.sum(1) == 1).sum()) if len(annotation.targets) == 2 else 0,
        constant=tuple(name for name in constant if name in annotation.targets),
        frames=len(valid),
        annotated=int(valid.sum()),
        stats=label_stats(on_frames["value"].astype(np.float64)),
        strip=strip(clock_times, valid, whole) if len(valid) else b"",
    )


def _is_constant(column: NDArray[np.float64]) -> bool:
    known = column[np.isfinite(column)]
    return known.size > 1 and bool((known == known[0]).all())


def label_stats(value: NDArray[np.float64]) -> LabelStats:
    """Sums of [N, 2] labels, NaN where there is none; a region counts frames that have both dimensions."""
    given = np.isfinite(value)
    filled = np.where(given, value, 0.0)
    both = value[given.all(1)]
    level = np.digitize(both, LEVEL_EDGES)
    cell = np.clip(np.floor((both + 1) * (CELLS / 2)), 0, CELLS - 1).astype(np.int64)
    return LabelStats(
        count=given.sum(0),
        total=filled.sum(0),
        squares=(filled**2).sum(0),
        low=np.where(given, value, np.inf).min(0, initial=np.inf),
        high=np.where(given, value, -np.inf).max(0, initial=-np.inf),
        regions=np.bincount(3 * level[:, 0] + level[:, 1], minlength=9),
        density=np.bincount(CELLS * cell[:, 0] + cell[:, 1], minlength=CELLS**2).reshape(CELLS, CELLS),
    )


def merge_stats(parts: Sequence[LabelStats]) -> LabelStats:
    """The sums over several clips."""
    parts = [label_stats(np.empty((0, 2))), *parts]
    return LabelStats(
        count=np.sum([part.count for part in parts], 0),
        total=np.sum([part.total for part in parts], 0),
        squares=np.sum([part.squares for part in parts], 0),
        low=np.min([part.low for part in parts], 0),
        high=np.max([part.high for part in parts], 0),
        regions=np.sum([part.regions for part in parts], 0),
        density=np.sum([part.density for part in parts], 0),
    )
