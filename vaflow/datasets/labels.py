"""Read label files (one error names every problem of a file), and put their annotations on the frame clock."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation
from vaflow.datasets.files import size_problem, text_encoding
from vaflow.errors import DataError, explain
from vaflow.timeline import extend, median_interval, nearest

TARGETS = ("valence", "arousal")
UNANNOTATED = -5.0
MAX_FRAME = 10_000_000  # 92 hours at 30 frames/s; larger numbers are rejected: they would allocate too much memory
MAX_SECONDS = 1_000_000.0  # 11 days; limit of times
EMPTY = frozenset({"", "nan", "na"})  # cells, in lower case, that mean "not annotated"; pandas and R write such
NOT_A_NUMBER = EMPTY | {"?"}  # ... in files that MATLAB or Weka wrote
CLOCK_GAP = 0.25  # seconds between the time of a frame and the time that its label states; more is a contradiction
LATE_LABELS = 1.0  # seconds that time-stamped labels may continue after the clip
USUAL_ROWS = (-3, 2)  # annotation rows minus frames, as in Aff-Wild2
_PAUSE = 1.5  # distance of two rows, in intervals, above which there is a gap
_RANGES_SHOWN = 10
_SHOWN = 40  # characters of a line in a message
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?", re.ASCII)

LineRange = tuple[int, int, str]  # first and last line, and the text of the first


class Problems:
    """Kinds of problem in a file, each with its lines."""

    def __init__(self) -> None:
        self._lines: dict[str, list[LineRange]] = {}

    def add(self, kind: str, line: int, got: str = "") -> None:
        """Record that `line` (1-based) has a problem of this kind; `got` is its text."""
        ranges = self._lines.setdefault(kind, [])
        if ranges and line == ranges[-1][1] + 1:  # as ranges: every line of a large file may have the same problem
            ranges[-1] = (ranges[-1][0], line, ranges[-1][2])
        else:
            ranges.append((line, line, got[:_SHOWN]))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {_describe(ranges)}" for kind, ranges in self._lines.items())


def _describe(ranges: Sequence[LineRange]) -> str:
    """[(3, 3, "a"), (7, 8, "b")] -> "line 3 ('a'), lines 7-8 ('b' first)"."""
    texts = []
    for first, last, got in ranges[:_RANGES_SHOWN]:
        where = f"line {first}" if first == last else f"lines {first}-{last}"
        shown = repr(got) + ("" if first == last else " first")
        texts.append(f"{where} ({shown})" if got else where)
    rest = sum(last - first + 1 for first, last, _ in ranges[_RANGES_SHOWN:])
    return ", ".join(texts) + (f" and {rest} more lines" if rest else "")


class LabelFile:
    """The lines of a label file, and the problems found in them.

    Raises:
        DataError: the file cannot be read, is far larger than labels are, or is empty.
    """

    def __init__(self, path: Path, expected: str) -> None:
        self.path, self.expected = path, expected
        self.problems = Problems()
        self.lines = self._read_lines()
        if not self.lines:
            raise self.error("an empty file")

    def _read_lines(self) -> list[str]:
        """Lines without byte-order mark, line ends and trailing empty lines, of UTF-8 text or UTF-16 with a mark."""
        raw = read_bytes(self.path)
        if (encoding := text_encoding(raw)) == "utf-16":
            try:
                raw = raw.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise self.error("damaged UTF-16 text") from error
        rows = raw.count(b"\n") + raw.count(b"\r")
        if rows > 2 * MAX_FRAME:
            raise self.error(f"about {rows} rows, more than the {MAX_FRAME} that a file can have")
        lines = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        while lines and not lines[-1].strip():
            lines.pop()
        texts = []
        for number, line in enumerate(lines, 1):
            try:
                texts.append(line.decode("utf-8"))
            except UnicodeDecodeError:
                self.problems.add("not UTF-8 text", number)
                texts.append(line.decode("utf-8", "replace"))
        return texts

    def error(self, got: object) -> DataError:
        """The error to raise for this file."""
        return unusable(self.path, self.expected, got)

    def header_error(self) -> DataError:
        """The error for a first line that is not the expected header."""
        return self.error(f"line 1 ({self.lines[0][:60]!r})")

    def rows(self, columns: int, *, first: int = 2, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
        """(line number, cells) of every line from `first` (1-based) on that has the right number of columns."""
        for number, line in enumerate(self.lines[first - 1 :], first):
            cells = split_cells(line, separator)
            if not line.strip():
                self.problems.add("empty line between rows", number)
            elif len(cells) != columns:
                self.problems.add(f"not {columns} columns", number, line)
            else:
                yield number, cells

    def value(self, cell: str, line: int, missing: Collection[str] = ()) -> float:
        """One valence or arousal in [-1, 1]; NaN if the cell is not annotated or has a problem."""
        if cell.lower() in missing:
            return np.nan
        if not is_number(cell):
            self.problems.add("not a number", line, cell or "empty")
            return np.nan
        number = float(cell)
        if number == UNANNOTATED:
            return np.nan
        if not -1 <= number <= 1:
            self.problems.add("beyond [-1, 1] (-5 means not annotated)", line, cell)
            return np.nan
        return number

    def stamps(self, cells: Iterable[tuple[int, str]], unit: str) -> NDArray[np.float64]:
        """Frame numbers or times of (line, cell), which must ascend; `unit`: "frames", "seconds" or "milliseconds"."""
        most = {"frames": MAX_FRAME, "seconds": MAX_SECONDS, "milliseconds": 1000 * MAX_SECONDS}[unit]
        kind, form = ("frame", "frame number (whole") if unit == "frames" else ("time", f"time ({unit}")
        numbers, last = [], -np.inf
        for line, cell in cells:
            plain = re.fullmatch(r"\d{1,9}", cell, re.ASCII) is not None if unit == "frames" else is_number(cell)
            if not plain or not 0 <= float(cell) <= most:
                self.problems.add(f"not a {form}, from 0 to {most:.0f})", line, cell or "empty")
                continue
            if float(cell) <= last:
                self.problems.add(f"{kind} does not come after the one before", line, cell)
            last = float(cell)
            numbers.append(last)
        return np.array(numbers, np.float64)

    def timed_values(
        self,
        names: Sequence[str],
        clock: str,
        targets: Sequence[str],
        *,
        first: int = 2,
        separator: str = ",",
        missing: Collection[str] = EMPTY,
        stated: str = "",
    ) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float64] | None]:
        """The clock [N], values [N, K] and numbers of the column `stated` [N] (None without it) of a whole table.

        Args:
            clock: name of the column of times; "frame": of frame numbers.
            targets: names of the K columns of values.
            first: line of the first row, 1-based.
            missing: cells, in lower case, that mean "not annotated".
            stated: name of a further column, whose cells are NaN where they are no numbers.

        Raises:
            DataError: with every problem and its lines, or if the file has no rows.
        """
        stamps, values, numbers = [], [], []
        for number, cells in self.rows(len(names), first=first, separator=separator):
            stamps.append((number, cells[names.index(clock)]))
            values.append([self.value(cells[names.index(target)], number, missing) for target in targets])
            if stated:
                cell = cells[names.index(stated)]
                numbers.append(float(cell) if is_number(cell) else np.nan)
        at = self.stamps(stamps, "frames" if clock == "frame" else "seconds")
        self.check(len(values))
        return at, np.array(values, np.float32), np.array(numbers, np.float64) if stated else None

    def check(self, rows: int) -> None:
        """Raise a DataError if there are problems, or no rows."""
        if self.problems:
            raise self.error(self.problems)
        if not rows:
            raise self.error("no rows")


def read_bytes(path: Path) -> bytes:
    """The bytes of a label file.

    Raises:
        DataError: the file cannot be read, or is far larger than labels are.
    """
    if (problem := size_problem(path)) is not None:
        raise DataError(explain(f"The labels {path} cannot be used", expected="a file of labels", got=problem))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(explain(f"Cannot read the labels {path}", got=error.strerror or str(error))) from error


def unusable(path: Path, expected: str, got: object) -> DataError:
    """The error for a label file: its expected form, and all its problems."""
    remedy = "Correct the file, or remove it to use the clip without labels"
    return DataError(explain(f"The labels {path} cannot be used", expected=expected, got=got, remedy=remedy))


def split_cells(line: str, separator: str = ",") -> list[str]:
    """The cells of a line, without blanks and quotes around them; decimal commas become points."""
    cells = [cell.strip().strip("'\"").strip() for cell in line.split(separator)]
    return cells if separator == "," else [decimal_point(cell) for cell in cells]


def decimal_point(cell: str) -> str:
    """A cell with its decimal comma as a point; any other text as it is."""
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell


def is_number(cell: str) -> bool:
    """Whether a cell is a plain decimal number: no "nan", no "inf", no underscores."""
    return _NUMBER.fullmatch(cell) is not None


def on_clock(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Labels at the times of the video's frames.

    Row k of a frame-numbered annotation belongs to frame `frame[k]`, whatever its time; rows beyond the last frame
    continue at the frames' median interval. With time-stamped rows, a frame takes the nearest row, of two equally near
    ones the earlier: within half a label interval, or within a whole one between two rows, so that irregular stamps
    leave no holes. Nothing is interpolated or extrapolated. Without frames (no video), time-stamped rows keep their
    own times.

    Args:
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


def require_times(item: str, annotation: Annotation) -> None:
    """Check the labels of a clip that is audio only.

    Raises:
        DataError: they are numbered by frame.
    """
    if annotation.time is None:
        problem = f"The labels of {item!r} are numbered by frame, and the clip is audio only"
        raise DataError(explain(problem, expected="labels with a column of times in seconds"))


def clock_gap(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> float:
    """Largest distance in seconds of a frame's time from the one that the file states beside its number; 0 without."""
    if annotation is None or annotation.frame is None or annotation.stated is None:
        return 0.0
    inside = (annotation.frame < len(frame_times)) & np.isfinite(annotation.stated)
    return float(np.abs(frame_times[annotation.frame[inside]] - annotation.stated[inside]).max(initial=0.0))


def clock_problem(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> str:
    """Why labels may not belong to a clip, as a code of `vaflow check`; "" if nothing speaks against it.

    Args:
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
