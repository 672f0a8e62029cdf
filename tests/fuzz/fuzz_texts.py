"""Hostile texts, documents and arrays, and everything that reads them: a family is a strategy and a reader.

A reader gets a folder of its own and one example. It must end, or raise an error of ours with one line of message.
"""

import copy
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vaflow.cache import create_cache, open_cache
from vaflow.cache.convert import convert
from vaflow.cache.documents import seal
from vaflow.cache.schema import StreamInfo, array_problems
from vaflow.cache.verify import open_for_repair, repair, verify
from vaflow.datasets import Clip, open_dataset
from vaflow.datasets.labels import DIMENSION_READERS, READERS, on_clock, read_annotation
from vaflow.encoders.prompts import load_prompts
from vaflow.errors import VaflowError
from vaflow.extract.failures import only_failed
from vaflow.extract.importing.files import FeatureFile, find_features, read_features, signature
from vaflow.extract.importing.targets import read_targets

LABELS = StreamInfo("labels", "labels", 0, "float32")
FRAMES = np.arange(50) / 25
Reader = Callable[[Path, Any], object]


@dataclass(frozen=True)
class Family:
    """Examples of one kind, and who reads them."""

    examples: SearchStrategy[Any]
    read: Reader


def outcome_of(read: Reader, folder: Path, example: Any) -> str:
    """ "read" or "refused"; anything else is raised. The folder is emptied."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        read(folder, example)
    except VaflowError as error:
        message = str(error)
        assert message, f"{type(error).__name__} without a message"
        assert len(message.splitlines()) == 1, message
        return "refused"
    finally:
        shutil.rmtree(folder)
    return "read"


# --- text

NUMBERS = (
    "0",
    "1",
    "-1",
    "0.5",
    "-5",
    "-5.0",
    "1e300",
    "1e-300",
    "-1e999",
    "nan",
    "inf",
    "-inf",
    "2147483648",
    "9" * 400,
)
WORDS = (
    "",
    " ",
    "a",
    "?",
    "é",
    "e\u0301",
    "\u202eabc",
    "٣",
    "0x10",
    "1_000",
    "None",
    '"',
    "'",
    "\0",
    "\x1b[2J",
    "x" * 300,
)
HEADS = (
    *("valence,arousal", "frame,valence,arousal", "time,valence,arousal", "time,a,b", "timestamp,value,segment_id"),
    *(
        "name,split",
        "Id,Proposal",
        "image_location,valence,arousal",
        "frame,AU1,AU2",
        "Neutral,Happy,Sad",
        "Name; frameTime; GoldStandard",
    ),
    *(
        "timestamp;arousal;valence;liking",
        "@relation x\n@attribute name string\n@attribute frameTime numeric\n@attribute GoldStandard numeric\n@data",
    ),
)
CELL = st.sampled_from(NUMBERS + WORDS) | st.text(max_size=6) | st.floats(-1, 1).map(str) | st.integers(0, 60).map(str)
ROW = st.tuples(st.lists(CELL, max_size=5), st.sampled_from((",", ",", ";", "\t"))).map(
    lambda pair: pair[1].join(pair[0])
)
TABLE = st.tuples(
    st.sampled_from(HEADS) | ROW, st.lists(ROW, max_size=12), st.sampled_from(("\n", "\n", "\r\n", "\r")), st.booleans()
).map(lambda t: (b"\xef\xbb\xbf" if t[3] else b"") + t[2].join([t[0], *t[1]]).encode("utf-8", "surrogatepass"))
TEXT = TABLE | st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))


# What whole files look like: a head, and a row of number k. A few cells of them are then changed.
WHOLE: Mapping[str, tuple[str, str]] = {
    "affwild2": ("valence,arousal", "{v},{a}"),
    "csv": ("frame,valence,arousal", "{k},{v},{a}"),
    "sewa": ("timestamp;arousal;valence;liking", "{t};{a};{v};0"),
    "recola": (HEADS[-1], "'x',{t},{v}"),
    "muse": ("timestamp,value,segment_id", "{ms},{v},1"),
    "times": ("time,valence,arousal", "{t},{v},{a}"),
    "features": ("time,one,two,three", "{t},{v},{a},3"),
    "classes": ("frame,Neutral,Happy", "{k},1,0"),
    "sample": ("image_location,valence,arousal", "trial/{n:05}.jpg,{v},{a}"),
    "splits": ("name,split", "a,train"),
    "partition": ("Id,Proposal", "a,devel"),
}
Edit = tuple[int, int, str]  # line, cell, what stands there instead
EDITS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), CELL), max_size=2)


def tables(name: str) -> SearchStrategy[bytes]:
    """Whole tables with at most two cells changed, and at most one byte."""
    flips = st.none() | st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 255))
    whole = st.tuples(st.integers(0, 8), EDITS, flips, st.sampled_from(("\n", "\n", "\r\n")))
    return whole.map(lambda found: _table(name, *found))


def _table(name: str, count: int, edits: list[Edit], flip: tuple[int, int] | None, end: str) -> bytes:
    head, row = WHOLE[name]
    values = (
        {"k": k, "n": k + 1, "t": k / 10, "ms": 100 * k, "v": k / 10 - 0.5, "a": -5 if k == 3 else 0.25}
        for k in range(count)
    )
    lines = [head, *(row.format(**value) for value in values)]
    separator = ";" if ";" in row else ","
    for line, cell, text in edits:
        cells = lines[line % len(lines)].split(separator)
        cells[cell % len(cells)] = text
        lines[line % len(lines)] = separator.join(cells)
    data = bytearray(end.join(lines).encode("utf-8", "surrogatepass"))
    if flip is not None and data:
        data[flip[0] % len(data)] = flip[1]
    return bytes(data)


def _labels(name: str, folder: Path, data: bytes) -> None:
    path = folder / "labels"
    path.write_bytes(data)
    if name in DIMENSION_READERS:
        clip = Clip("a", None, "a", None, labels=path, label_format=name, dimensions=(("valence", path),))
    else:
        clip = Clip("a", None, "a", None, labels=path, label_format=name)
    annotation = read_annotation(clip)
    assert annotation is not None
    for times in (FRAMES, FRAMES[:1]):
        problems = array_problems(LABELS, on_clock(annotation, times))
        assert not problems, problems


def _lists(folder: Path, data: bytes) -> None:
    """All lists of names that a data set can bring."""
    for layout, name in (("videos", "splits.csv"), ("muse", "partition.csv"), ("affwild2", "test_set.txt")):
        root = folder / layout
        (root / "arousal").mkdir(parents=True)
        (root / "VA_Set" / "Train_Set").mkdir(parents=True)
        (root / "VA_Set" / "Train_Set" / "a.txt").write_text("valence,arousal\n0,0\n")
        (root / "arousal" / "a.csv").write_text("timestamp,value,segment_id\n0,0,1\n")
        (root / "a.mp4").touch()
        (root / name).write_bytes(data)
    problems = []
    for layout in ("videos", "muse", "affwild2"):
        try:
            dataset = open_dataset(folder / layout, layout)
        except VaflowError as error:
            problems.append(error)
        else:
            assert all(clip.video is None or clip.video.is_relative_to(folder) for clip in dataset.clips)
    if problems:
        raise problems[0]


def _features(folder: Path, data: bytes) -> None:
    (folder / "a.csv").write_bytes(data)
    (file,) = find_features(folder)
    _read_features(file)


def _read_features(file: FeatureFile) -> None:
    dim = signature(file).dim
    features = read_features(file, 10.0)
    assert features.embedding.shape == (len(features.time), dim)
    assert np.isfinite(features.embedding).all()
    assert (np.diff(features.time) > 0).all()


def _targets(folder: Path, data: bytes) -> None:
    (folder / "a.csv").write_bytes(data)
    for task in ("classes", "binary"):
        table = read_targets(folder / "a.csv", task)
        assert table.value.shape == (len(table.at), len(table.names))


def _sample(folder: Path, data: bytes) -> None:
    from vaflow.train.submit import read_sample

    (folder / "sample.txt").write_bytes(data)
    assert read_sample(folder / "sample.txt")


def _failures(folder: Path, data: bytes) -> None:
    root = folder / "data"
    root.mkdir()
    (root / "a.mp4").touch()
    (folder / "failures.jsonl").write_bytes(data)
    assert only_failed(open_dataset(root, "videos"), folder).clips


# --- JSON and TOML

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
Change = tuple[int, str, Any]  # which place of a document, what is done there, with what
CHANGES = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(("replace", "replace", "drop", "add", "rename")), VALUE),
    min_size=1,
    max_size=3,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of a document, as the way to it."""
    found = []
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found += [(*path, key), *places(document[key], (*path, key))]
    return found


def changed(document: Any, changes: list[Change]) -> Any:
    """A copy in which something else stands in a few places."""
    document = copy.deepcopy(document)
    for number, what, value in changes:
        ways = places(document)
        if not ways:
            return document
        *way, last = ways[number % len(ways)]
        owner = document
        for key in way:
            owner = owner[key]
        if what == "drop":
            del owner[last]
        elif what == "replace" or isinstance(owner, list):
            owner[last] = value
        else:
            owner["x" if what == "add" else str(value)[:50]] = value if what == "add" else owner.pop(last)
    return document


def _read_cache(folder: Path, sentinel: Path) -> None:
    """What users do with a cache, ending with what removes things."""
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
    """Reads copies of one small cache in which one document was changed; sealed again, or not."""

    def __init__(self) -> None:
        self._whole: dict[str, bytes] = {}

    def __call__(self, folder: Path, example: tuple[str, list[Change] | bytes, bool]) -> None:
        """Put the cache down, change it, use it."""
        name, changes, sealed = example
        with patch("os.fsync"), patch("vaflow.cache.index._FINE", 0):  # a power cut is none of this, and waiting long
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


_CHANGED = st.tuples(st.sampled_from(DOCUMENTS), CHANGES, st.sampled_from((True, True, True, False)))
_REPLACED = st.tuples(st.sampled_from((*DOCUMENTS, "index.json")), st.binary(max_size=80), st.just(False))


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
    return st.lists(line, max_size=12).map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass")) | st.tuples(
        st.integers(0, len(lines)), line
    ).map(
        lambda change: "\n".join([*lines[: change[0]], change[1], *lines[change[0] + 1 :]]).encode(
            "utf-8", "surrogatepass"
        )
    )


def _settings(folder: Path, data: bytes) -> None:
    from vaflow.train.config import merge, read_settings

    (folder / "train.toml").write_bytes(data)
    merge(read_settings(folder / "train.toml"))


def _prompts(folder: Path, data: bytes) -> None:
    (folder / "prompts.toml").write_bytes(data)
    assert len(load_prompts(folder / "prompts.toml").texts()[0]) == 9


def _tables(folder: Path, data: bytes) -> None:
    from vaflow.train.ablate.grid import expand, load_study

    (folder / "tables.toml").write_bytes(data)
    study = load_study(folder / "tables.toml")
    for table in study.tables:
        expand(table, ["default", "other"])
    assert study.streams() is not None


def _run_record(folder: Path, data: bytes) -> None:
    from vaflow.train.runs import require_record

    (folder / "config.toml").write_bytes(data)
    require_record(folder)


# --- what runs keep as JSON

RUN_FILES: Mapping[str, Any] = {
    "smoothing.json": {"kind": "median", "seconds": 1.0},
    "ensemble.json": {"runs": ["a", "b"], "how": "mean", "weights": {"valence": [0.5, 0.5], "arousal": [0.5, 0.5]}},
    "sources.json": {
        "made": "now", "vaflow": "0", "run": "x", "settings": "y", "weights": {}, "cache": "c", "store": "zarr",
        "streams": {}, "items": {"a": {"csv": "d", "records": {}, "media": None}},
    },
    "metrics.json": {"split": "val", "ccc": {"mean": 0.5}, "n_frames": 3},
}  # fmt: skip


def _run_file(folder: Path, example: tuple[str, list[Change] | bytes]) -> None:
    from vaflow.train.ensemble import members_of
    from vaflow.train.provenance import read_sources
    from vaflow.train.runs import RunFolder
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


# --- arrays

DESCR = st.sampled_from(
    ("<f4", "<f2", ">f8", "|i1", "|b1", "|O", "<U4", "<c8", "<M8[s]", "|V0", "|S0", "<f16", "nonsense", "")
)
SHAPE = st.lists(st.sampled_from((0, 1, 2, 4, 8, -1, 2**31, 2**62, 2**63)), max_size=4).map(tuple)
HEADER = st.fixed_dictionaries({"descr": DESCR, "fortran_order": st.booleans() | LEAF, "shape": SHAPE | VALUE}).map(
    repr
)
NPY = st.tuples(HEADER | st.text(max_size=60), st.binary(max_size=300), st.integers(0, 3)).map(
    lambda parts: b"\x93NUMPY" + bytes([parts[2], 0]) + _sized(parts[0], parts[2]) + parts[1]
)  # fmt: skip


def _sized(header: str, version: int) -> bytes:
    raw = (header + "\n").encode("utf-8", "surrogatepass")
    return struct.pack("<H" if version < 2 else "<I", len(raw)) + raw


def whole_npy(array: Any) -> bytes:
    """The file of an array."""
    from io import BytesIO

    file = BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


_ROWS = st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), max_size=6).map(
    lambda rows: whole_npy(np.array(rows, np.float32).reshape(-1, 2))
)
_TIMES = st.lists(st.floats(), max_size=6).map(whole_npy)


def _arrays(folder: Path, example: tuple[bytes, bytes | None]) -> None:
    features, times = example
    (folder / "a.npy").write_bytes(features)
    if times is not None:
        (folder / "a.time.npy").write_bytes(times)
    (file,) = find_features(folder)
    _read_features(file)


def _tensors(folder: Path, data: bytes) -> None:
    from vaflow.encoders.weights import read_state_dict
    from vaflow.train.storage import read_tensors

    (folder / "a.safetensors").write_bytes(data)
    (folder / "a.pt").write_bytes(data)
    problems = []
    for read, name in ((read_tensors, "a.safetensors"), (read_state_dict, "a.safetensors"), (read_state_dict, "a.pt")):
        try:
            read(folder / name)
        except VaflowError as error:
            problems.append(error)
    if problems:
        raise problems[0]


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "F16", "I64", "X", "")),
        "shape": st.lists(st.sampled_from((0, 1, 2, 4, 2**31, 2**63)), max_size=3) | LEAF,
        "data_offsets": st.lists(st.sampled_from((0, 4, 8, 16, 2**63)), min_size=2, max_size=2) | LEAF,
    }
)
TENSORS = st.tuples(st.dictionaries(st.text(max_size=4), TENSOR | LEAF, max_size=2), st.binary(max_size=32)).map(
    lambda pair: (lambda head: struct.pack("<Q", len(head)) + head + pair[1])(json.dumps(pair[0]).encode())
)
PICKLES = st.sampled_from(
    (
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x04N.",
        b"PK\x03\x04",
    )
)


def families() -> dict[str, Family]:
    """Every family by name."""
    from importlib import resources

    config = resources.files("vaflow.train").joinpath("presets.toml").read_text("utf-8")
    rows = resources.files("vaflow.train").joinpath("tables.toml").read_text("utf-8")
    prompts = resources.files("vaflow.encoders").joinpath("prompts.toml").read_text("utf-8")
    return {
        **{f"labels {name}": Family(TEXT | _label_texts(name), partial(_labels, name)) for name in FORMATS},
        "lists of names": Family(TEXT | tables("splits") | tables("partition"), _lists),
        "feature tables": Family(TEXT | tables("features"), _features),
        "target tables": Family(TEXT | tables("classes"), _targets),
        "sample submissions": Family(TEXT | tables("sample"), _sample),
        "lists of failures": Family(TEXT | st.lists(VALUE, max_size=4).map(_lines), _failures),
        "cache documents": Family(_CHANGED | _REPLACED, CacheReader()),
        "training settings": Family(toml_texts(SETTINGS + config), _settings),
        "prompt sets": Family(toml_texts(prompts), _prompts),
        "ablation tables": Family(toml_texts(rows), _tables),
        "run settings": Family(toml_texts(RUN), _run_record),
        "run files": Family(st.tuples(st.sampled_from(sorted(RUN_FILES)), CHANGES | st.binary(max_size=60)), _run_file),
        "feature arrays": Family(st.tuples(NPY | _ROWS | st.binary(max_size=90), st.none() | _TIMES | NPY), _arrays),
        "weights": Family(TENSORS | PICKLES | st.binary(max_size=90), _tensors),
    }  # fmt: skip


def _label_texts(name: str) -> SearchStrategy[bytes]:
    if name != "afew-va":
        return tables(name) | tables("times") if name == "csv" else tables(name)
    frame = st.fixed_dictionaries({}, optional={"valence": LEAF | st.integers(-10, 10), "arousal": LEAF})
    number = st.integers(0, 30).map("{:05}".format) | st.sampled_from(("2147483648", "-1", "x", "٣", ""))
    document = st.fixed_dictionaries({"frames": st.dictionaries(number, frame | VALUE, max_size=5) | VALUE}) | VALUE
    return document.map(lambda found: json.dumps(found).encode()) | st.just(b"[" * 100_000)


def _lines(values: list[Any]) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in [{"item": "a"}, *values])


FORMATS = (*READERS, *DIMENSION_READERS)
SETTINGS = (
    'visual = ["clip-vit-b16"]\naudio = ["none"]\nepochs = 3\nlr = 1e-4\nseed = 0\nwindow = 10.0\nfinetune = false\n'
)
RUN = """vaflow = "0.1.0"
cache = "/data/cache"
[train]
epochs = 3
visual = ["seen"]
[data.train]
clips = 3
[[stream]]
name = "seen"
kind = "visual"
dim = 4
steps = 20
fingerprint = "00"
identity = "{}"
[[target]]
name = "x"
task = "binary"
names = ["a"]
"""
