"""Collecting what is wrong with a text file, so that one message can name it all."""

from collections.abc import Sequence

RANGES_SHOWN = 40
SHOWN = 40  # characters of what stands in a line

Run = tuple[int, int, str]  # first and last line, and what stands in the first


class Problems:
    """What is wrong with a file: kinds of problem, each with its lines."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Run]] = {}

    def add(self, kind: str, line: int, got: str = "") -> None:
        """Note that `line` (1-based) has a problem of this kind; `got` is what stands there."""
        runs = self._lines.setdefault(kind, [])
        if runs and line == runs[-1][1] + 1:  # as runs: every line of a large file may have the same problem
            runs[-1] = (runs[-1][0], line, runs[-1][2])
        else:
            runs.append((line, line, got[:SHOWN]))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {_ranges(lines)}" for kind, lines in self._lines.items())


def _ranges(runs: Sequence[Run]) -> str:
    """[(3, 3, "a"), (7, 8, "b")] -> "line 3 ('a'), lines 7-8 ('b' first)"."""
    texts = []
    for first, last, got in runs[:RANGES_SHOWN]:
        where = f"line {first}" if first == last else f"lines {first}-{last}"
        shown = repr(got) + ("" if first == last else " first")
        texts.append(f"{where} ({shown})" if got else where)
    rest = sum(last - first + 1 for first, last, _ in runs[RANGES_SHOWN:])
    return ", ".join(texts) + (f" and {rest} more lines" if rest else "")
