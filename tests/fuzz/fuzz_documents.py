"""Hostile JSON and TOML: caches, settings, prompts, ablation tables, run files."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from fuzz_tables import CELL, FRAMES, LABELS
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vaflow.cache import create_cache, open_cache
from vaflow.cache.copy import convert
from vaflow.cache.layout import seal
from vaflow.cache.maintenance import open_for_repair, repair, verify
from vaflow.cache.schema import StreamInfo
from vaflow.datasets.labels import on_clock
from vaflow.encoders.prompts import load_prompts
from vaflow.errors import VaflowError

LEAF = (
    st.none()
    | st.booleans()
    | st.sampled_from(
        (0, -1, 2**31, 2**63, 10**400, 0.5, 1e300, "", "..", "../../x", "/etc/passwd", "a\0b", "zarr", "nan")
    )
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUE: SearchStrategy[Any] = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
Change = tuple[int, str, Any]  # position in a document, kind of change, new value
CHANGES = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(("replace", "replace", "drop", "add", "rename")), VALUE),
    min_size=1,
    max_size=3,
)


def key_paths(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every key and index in a document."""
    paths = []
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        paths += [(*path, key), *key_paths(document[key], (*path, key))]
    return paths


def changed(document: Any, changes: list[Change]) -> Any:
    """Return a copy with a few values replaced."""
    document = copy.deepcopy(document)
    for number, value_kind, value in changes:
        key_paths_ = key_paths(document)
        if not key_paths_:
            return document
        *parents, last = key_paths_[number % len(key_paths_)]
        owner = document
        for key in parents:
            owner = owner[key]
        if value_kind == "drop":
            del owner[last]
        elif value_kind == "replace" or isinstance(owner, list):
            owner[last] = value
        else:
            owner["x" if value_kind == "add" else str(value)[:50]] = value if value_kind == "add" else owner.pop(last)
    return document


def _read_cache(folder: Path, sentinel: Path) -> None:
    """Use a cache as users do, ending with commands that remove files."""
    problems: list[VaflowError] = []
    for use in (_use_cache, partial(_convert_cache, folder), _mend_cache):
        try:
            use(folder / "cache")
        except VaflowError as error:
            problems.append(error)
    assert sentinel.read_text() == "kept"
    if problems:
        raise problems[0]


def _use_cache(path: Path) -> None:
    cache = open_cache(path)
    verify(cache)
    cache.info()
    for name in cache.streams():
        for item in cache.items(stream=name):
            cache.read(name, item)


def _convert_cache(folder: Path, path: Path) -> None:
    convert(open_cache(path), folder / "copy", "hdf5")


def _mend_cache(path: Path) -> None:
    repair(open_for_repair(path))
    # What made a stream cannot be told from its items: they stay, and count when it is declared again.
    assert all(problem.path.startswith("streams/") for problem in verify(open_cache(path)))


def make_cache(folder: Path) -> Path:
    """A small cache, HDF5 for speed, beside a file that must stay."""
    (folder / "sentinel").write_text("kept")
    cache = create_cache(folder / "cache", store="hdf5")
    cache.declare(LABELS)
    cache.declare(StreamInfo("seen", "visual", 4, "float16", {"sampling": {"window": 10.0}}))
    for item in ("one", "two"):
        time = np.arange(5) / 2
        embedding = np.ones((5, 4), np.float16)
        cache.write("seen", item, {"embedding": embedding, "time": time, "valid": np.ones(5, bool)})
        labels = on_clock(None, FRAMES)
        cache.write("labels", item, labels, meta={"split": "train", "group": item, "duration": 2.0})
    cache.refresh_index()
    return folder


DOCUMENTS = ("manifest.json", "streams/seen.json", "records/seen/one.json", "records/labels/one.json")


class CacheReader:
    """Read copies of a small cache in which one document was changed, with or without a valid seal."""

    def __init__(self) -> None:
        self._whole: dict[str, bytes] = {}

    def __call__(self, folder: Path, example: tuple[str, list[Change] | bytes, bool]) -> None:
        """Write the cache, change it, use it."""
        name, changes, sealed = example
        with (
            patch("os.fsync"),
            patch("vaflow.cache.commit._FINE", 0),
        ):  # power cuts are not tested here, and waiting takes long
            self._use(folder, name, changes, sealed)

    def _use(self, folder: Path, name: str, changes: list[Change] | bytes, sealed: bool) -> None:
        self._put(folder)
        file = folder / "cache" / name
        if isinstance(changes, bytes):
            file.write_bytes(changes)
        else:
            document = json.loads(file.read_bytes())
            del document["crc32c"]
            document = changed(document, changes)
            file.write_bytes(seal(document) if sealed and isinstance(document, dict) else json.dumps(document).encode())
        _read_cache(folder, folder / "sentinel")

    def _put(self, folder: Path) -> None:
        if not self._whole:
            make_cache(folder)
            files = [path for path in folder.rglob("*") if path.is_file()]
            self._whole = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        for name, data in self._whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


CHANGED = st.tuples(st.sampled_from(DOCUMENTS), CHANGES, st.sampled_from((True, True, True, False)))
REPLACED = st.tuples(st.sampled_from((*DOCUMENTS, "index.json")), st.binary(max_size=80), st.just(False))


def toml_texts(whole: str) -> SearchStrategy[bytes]:
    """Lines of a real file, changed, repeated, left out; values of other types; and noise."""
    lines = [line for line in whole.splitlines() if line.strip()]
    keys = [line.partition("=")[0] for line in lines if "=" in line and not line.startswith("#")]
    values = st.sampled_from(
        (
            "inf",
            "nan",
            "-1",
            "1e400",
            "9" * 5000,
            '""',
            '"..\\\\.."',
            "[]",
            "[[1]]",
            "{}",
            "true",
            "1979-05-27",
            "[" * 3000,
            '"\\u0000"',
        )
    )
    pair = st.tuples(st.sampled_from(keys), values).map("=".join)
    line = st.sampled_from(lines) | pair | st.text(max_size=20) | CELL
    return st.lists(line, max_size=12).map(
        lambda text_lines: "\n".join(text_lines).encode("utf-8", "surrogatepass")
    ) | st.tuples(st.integers(0, len(lines)), line).map(
        lambda change: "\n".join([*lines[: change[0]], change[1], *lines[change[0] + 1 :]]).encode(
            "utf-8", "surrogatepass"
        )
    )


def try_settings(folder: Path, data: bytes) -> None:
    from vaflow.train.config import merge, read_settings

    (folder / "train.toml").write_bytes(data)
    merge(read_settings(folder / "train.toml"))


def try_prompts(folder: Path, data: bytes) -> None:
    (folder / "prompts.toml").write_bytes(data)
    assert len(load_prompts(folder / "prompts.toml").texts()[0]) == 9


def try_tables(folder: Path, data: bytes) -> None:
    from vaflow.train.ablate.tables import expand, load_study

    (folder / "tables.toml").write_bytes(data)
    study = load_study(folder / "tables.toml")
    for table in study.tables:
        expand(table, ["default", "other"])
    assert study.streams() is not None


def try_run_record(folder: Path, data: bytes) -> None:
    from vaflow.train.run_folder import require_record

    (folder / "config.toml").write_bytes(data)
    require_record(folder)


RUN_FILES: Mapping[str, Any] = {
    "smoothing.json": {"kind": "median", "seconds": 1.0},
    "ensemble.json": {"runs": ["a", "b"], "how": "mean", "weights": {"valence": [0.5, 0.5], "arousal": [0.5, 0.5]}},
    "sources.json": {
        "made": "now", "vaflow": "0", "run": "x", "settings": "y", "weights": {}, "cache": "c", "store": "zarr",
        "streams": {}, "items": {"a": {"csv": "d", "records": {}, "media": None}},
    },
    "metrics.json": {"split": "val", "ccc": {"mean": 0.5}, "n_frames": 3},
}  # fmt: skip


def try_run_file(folder: Path, example: tuple[str, list[Change] | bytes]) -> None:
    from vaflow.train.ensemble import members_of
    from vaflow.train.prediction_files import read_sources
    from vaflow.train.run_folder import RunFolder
    from vaflow.train.smoothing import read_smoothing

    name, changes = example
    text = changes if isinstance(changes, bytes) else json.dumps(changed(RUN_FILES[name], changes)).encode()
    (folder / name).write_bytes(text)
    readers: dict[str, Callable[[], object]] = {
        "smoothing.json": lambda: read_smoothing(folder),
        "ensemble.json": lambda: members_of(folder),
        "sources.json": lambda: read_sources(folder),
        "metrics.json": lambda: RunFolder(folder).read_metrics(),
    }
    readers[name]()
