"""`splits.csv`: which item is for training, validation or test."""

import csv
from collections.abc import Collection
from pathlib import Path

from vaflow.datasets.clip import SPLITS, Note
from vaflow.datasets.files import examples, size_problem
from vaflow.errors import UsageError, explain

SPLITS_FILE = "splits.csv"


def read_splits(path: Path) -> dict[str, str]:
    """name -> split, from a table with the columns `name` and `split`.

    Raises:
        UsageError: the file is not such a table, names an unknown split, or gives one name two splits; every problem
            is listed with its line.
    """
    if (problem := size_problem(path)) is not None:
        raise UsageError(explain(f"Cannot read {path}", expected="a list of splits", got=problem))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(explain(f"Cannot read {path}", expected="UTF-8 text", got=error)) from error
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if "name" not in header or "split" not in header:
        got = f"{','.join(header)!r}" if rows else "an empty file"
        raise UsageError(explain(f"{path} is not a list of splits", expected="the header 'name,split'", got=got))
    name_at, split_at = header.index("name"), header.index("split")
    splits: dict[str, str] = {}
    problems = []
    for number, row in rows[1:]:
        if len(row) != len(header):
            problems.append(f"line {number} has {len(row)} columns")
            continue
        name, split = row[name_at], row[split_at].lower()
        if split not in SPLITS:
            problems.append(f"line {number} has the split {row[split_at]!r}")
        elif splits.setdefault(name, split) != split:
            problems.append(f"line {number} puts {name!r} into {split}, an earlier line into {splits[name]}")
    if problems:
        got = examples(problems, shown=20)
        raise UsageError(
            explain(f"{path} has mistakes", expected=f"{len(header)} columns a line", got=got, choices=SPLITS)
        )
    return splits


def match_splits(splits: dict[str, str], names: Collection[tuple[str, str]]) -> tuple[dict[str, str], list[Note]]:
    """Splits by item id, for names written as the id or as the path with its extension.

    Args:
        splits: as `read_splits` gives them.
        names: (item id, path below the root with extension) of every item.

    Returns:
        item id -> split, and notes on names that fit no item and items that have no split.

    Raises:
        UsageError: an item has one split by its id and another by its path.
    """
    by_item: dict[str, str] = {}
    used = set()
    for item, path in names:
        for name in {item, path} & splits.keys():
            used.add(name)
            if by_item.setdefault(item, splits[name]) != splits[name]:
                got = f"{item!r} in {splits[item]}, {path!r} in {splits[path]}"
                raise UsageError(explain(f"{SPLITS_FILE} gives one video two splits", expected="one", got=got))
    notes = []
    unknown = sorted(set(splits) - used)
    if unknown:
        message = f"{SPLITS_FILE} names what is not there: {examples(unknown)}"
        notes.append(Note("warning", "split-unknown-name", "", message, "Correct the names, or add the videos"))
    missing = sorted(item for item, _ in names if item not in by_item)
    if missing:
        message = f"{SPLITS_FILE} gives no split to: {examples(missing)}"
        notes.append(Note("warning", "split-missing", "", message, f"Add them to {SPLITS_FILE}"))
    return by_item, notes
