"""`splits.csv`: the split of each item, and optionally its group (source video, speaker) and further columns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.datasets.clip import SPLITS, Note
from vaflow.datasets.files import examples
from vaflow.datasets.labels import read_table
from vaflow.errors import UsageError, explain

SPLITS_FILE = "splits.csv"
_COLUMNS = ("name", "split", "group")


@dataclass(frozen=True)
class Assignment:
    """Splits and groups by item id; items without one are left out. `columns`: further columns, by item id."""

    splits: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


def read_splits(path: Path) -> dict[str, dict[str, str]]:
    """The columns of a `splits.csv`, in lower case, each as name -> cell; empty cells are left out.

    It has the column `name`, and `split` or `group` or both.

    Raises:
        UsageError: the file is not such a table, names an unknown split, or gives one name two splits or groups;
            every problem is listed with its line.
    """
    _, rows = read_table(path, "a list of splits", UsageError)
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if "name" not in header or not {"split", "group"} & set(header) or len(set(header)) != len(header):
        got = f"{','.join(header)!r}" if rows else "an empty file"
        raise UsageError(explain(f"{path} is not a list of splits", expected="the header 'name,split'", got=got))
    columns: dict[str, dict[str, str]] = {column: {} for column in header}
    problems = []
    for number, row in rows[1:]:
        if len(row) != len(header):
            problems.append(f"line {number} has {len(row)} columns")
            continue
        cells = dict(zip(header, row, strict=True))
        if "split" in cells:
            cells["split"] = cells["split"].lower()
            if cells["split"] not in SPLITS:
                problems.append(f"line {number} has the split {row[header.index('split')]!r}")
                continue
        for column, cell in cells.items():
            if cell and columns[column].setdefault(cells["name"], cell) != cell and column in _COLUMNS:
                before = columns[column][cells["name"]]
                problems.append(f"line {number} puts {cells['name']!r} into {cell}, an earlier line into {before}")
    if problems:
        got = examples(problems, shown=10)
        expected = f"{len(header)} columns a line"
        raise UsageError(explain(f"{path} has mistakes", expected=expected, got=got, choices=SPLITS))
    return columns


def assign(
    root: Path,
    names: Collection[tuple[str, str]],
    defaults: Mapping[str, str] | None = None,
    *,
    used: Collection[str] = (),
) -> Assignment:
    """Splits and groups of items from `root/splits.csv`, whose names are item ids or paths with their extension.

    Args:
        root: folder of the list; without a list, `defaults` alone count.
        names: (item id, path below the root with extension) of every item.
        defaults: item id -> split, for items that the list omits.
        used: further columns that the caller uses; other ones are warned about.

    Returns:
        The assignment, with notes on names that fit no item, items without a split, and unknown columns.

    Raises:
        UsageError: the list has mistakes, or gives an item one split by its id and another by its path.
    """
    splits = dict(defaults or {})
    if not (root / SPLITS_FILE).is_file():
        return Assignment(splits)
    listed = read_splits(root / SPLITS_FILE)
    columns: dict[str, dict[str, str]] = {column: {} for column in listed}
    for item, path in names:
        for column, cells in listed.items():
            values = {name: cells[name] for name in dict.fromkeys((item, path)) if name in cells}
            if column in ("split", "group") and len(set(values.values())) > 1:
                got = ", ".join(f"{name!r} in {value}" for name, value in values.items())
                raise UsageError(explain(f"{SPLITS_FILE} gives one item two {column}s", expected="one", got=got))
            if values:
                columns[column][item] = next(iter(values.values()))
    splits |= columns.get("split", {})
    notes = []
    known = {name for pair in names for name in pair}
    if unknown := sorted(listed["name"].keys() - known):
        message = f"{SPLITS_FILE} names unknown items: {examples(unknown)}"
        notes.append(Note("warning", "split-unknown-name", "", message, "Correct the names, or add the files"))
    if "split" in listed and (missing := sorted(item for item, _ in names if item not in splits)):
        message = f"{SPLITS_FILE} gives no split to: {examples(missing)}"
        notes.append(Note("warning", "split-missing", "", message, f"Add them to {SPLITS_FILE}"))
    if strange := [column for column in listed if column not in (*_COLUMNS, *used)]:
        message = f"Columns of {SPLITS_FILE} that are not used: {examples(strange)}"
        remedy = "Name the column 'group' if its clips must stay in one fold"
        notes.append(Note("warning", "split-unknown-column", "", message, remedy))
    return Assignment(splits, columns.get("group", {}), columns, tuple(notes))
