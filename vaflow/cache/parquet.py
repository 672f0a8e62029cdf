"""A cache as Parquet files that the Hugging Face `datasets` library loads: one configuration per stream.

DIR/README.md            names the configurations, their splits and files
    STREAM/SPLIT.parquet a row per clip: clip, split, and every array as a nested list, the first axis of any length
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from vaflow.cache.cache import Cache
from vaflow.cache.schema import KINDS, Array, StreamInfo
from vaflow.errors import UsageError, count, explain, visible
from vaflow.files import write_file

if TYPE_CHECKING:
    import pyarrow

NO_SPLIT = "unsplit"  # of clips without a split, and of prompt sets
LEFT_OUT = ("pixels", "crops")  # JPEG files of faces: personal data, and large


def export_parquet(cache: Cache, out: Path, step: Callable[[], object] | None = None) -> dict[str, int]:
    """Write the streams of a cache as Parquet; returns stream -> number of clips. Face crops are left out.

    Args:
        out: a new or empty folder.

    Raises:
        UsageError: pyarrow is missing, or `out` is not empty.
        CorruptError: an array is damaged.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        remedy = "From a clone: pip install -e '.[parquet]'"
        raise UsageError(explain("Parquet files require pyarrow", got=error, remedy=remedy)) from error
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(explain(f"{out} is not empty", expected="a new or empty folder"))
    streams = {name: info for name, info in cache.streams().items() if info.kind not in LEFT_OUT}
    files = {name: _write_stream(cache, info, out / quote(name, safe=""), step) for name, info in streams.items()}
    card = ["---", "configs:"]
    for name, splits in files.items():
        if splits:
            card += [f"- config_name: {_yaml(name)}", "  data_files:"]
            for split in map(_split_name, splits):
                path = f"{quote(name, safe='')}/{split}.parquet"
                card += [f"  - split: {_yaml(split)}", f"    path: {_yaml(path)}"]
    card += ["---", "", "# Features of a vaflow cache", ""]
    card += [
        f"- `{visible(name)}`: {info.kind}, {count(sum(files[name].values()), 'row')}" for name, info in streams.items()
    ]
    card += ["", "Times are seconds. `valid` is False where input is missing: a face, audio, or an annotation."]
    write_file(out / "README.md", "\n".join(card) + "\n")
    return {name: sum(splits.values()) for name, splits in files.items()}


def _write_stream(cache: Cache, info: StreamInfo, folder: Path, step: Callable[[], object] | None) -> dict[str, int]:
    """One file per split; returns split -> rows."""
    from pyarrow import parquet

    splits = defaultdict(list)
    for item in cache.items(stream=info.name):
        splits[(str(cache.meta(item).get("split") or "") if info.kind != "text" else "") or NO_SPLIT].append(item)
    for split, items in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{_split_name(split)}.parquet"
        writer = None
        for table in _tables(cache, info, split, items, step):
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return {split: len(items) for split, items in splits.items()}


def _tables(
    cache: Cache, info: StreamInfo, split: str, items: list[str], step: Callable[[], object] | None
) -> Iterator["pyarrow.Table"]:
    """One table of one row per clip."""
    import pyarrow

    required = [name for name, spec in KINDS[info.kind].items() if spec.required]  # columns of every table
    for item in items:
        columns: dict[str, Any] = {"clip": [visible(item)], "split": [visible(split)]}
        arrays = cache.read(info.name, item, required).arrays
        columns |= {name: _nested(arrays[name]) for name in required}
        yield pyarrow.table(columns)
        if step is not None:
            step()


def _nested(array: Array) -> "pyarrow.Array":
    """An array [N, ...] as one list of N nested lists; clips may differ in every axis."""
    import pyarrow

    values = pyarrow.array(np.ascontiguousarray(array).ravel())
    for axis in range(array.ndim - 1, -1, -1):
        number = int(np.prod(array.shape[:axis], dtype=np.int64))
        offsets = np.arange(number + 1, dtype=np.int32) * array.shape[axis]
        values = pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)
    return values


def _split_name(split: str) -> str:
    """A split as `datasets` allows it: letters, digits, underscores and dots."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else f"_{ord(c):x}_" for c in split)


def _yaml(text: str) -> str:
    return json.dumps(visible(text))  # JSON strings are YAML
