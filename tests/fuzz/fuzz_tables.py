"""Hostile tables and lines: label files, split lists, features, samples, failures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vaflow.cache.schema import StreamInfo, array_problems
from vaflow.datasets import DIMENSION_READERS, Clip, open_dataset, read_annotation
from vaflow.datasets.labels import on_clock
from vaflow.errors import VaflowError
from vaflow.extract.importing.feature_files import FeatureFile, find_features, read_features, signature
from vaflow.extract.importing.labels import read_targets
from vaflow.extract.plan import only_failed

LABELS = StreamInfo("labels", "labels", 0, "float32")
FRAMES = np.arange(50) / 25


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


# Valid files: a header, and a row with number k. A few of their cells are then changed.
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
Edit = tuple[int, int, str]  # line, cell, new text
EDITS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), CELL), max_size=2)


def tables(name: str) -> SearchStrategy[bytes]:
    """Whole tables with at most two cells changed, and at most one byte."""
    flips = st.none() | st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 255))
    whole = st.tuples(st.integers(0, 8), EDITS, flips, st.sampled_from(("\n", "\n", "\r\n")))
    return whole.map(lambda drawn: _table(name, *drawn))


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


def try_labels(name: str, folder: Path, data: bytes) -> None:
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


def try_lists(folder: Path, data: bytes) -> None:
    """Every list of names that a dataset can contain."""
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


def try_features(folder: Path, data: bytes) -> None:
    (folder / "a.csv").write_bytes(data)
    (file,) = find_features(folder)
    read_file_of_features(file)


def read_file_of_features(file: FeatureFile) -> None:
    dim = signature(file).dim
    features = read_features(file, 10.0)
    assert features.embedding.shape == (len(features.time), dim)
    assert np.isfinite(features.embedding).all()
    assert (np.diff(features.time) > 0).all()


def try_targets(folder: Path, data: bytes) -> None:
    (folder / "a.csv").write_bytes(data)
    for task in ("classes", "binary"):
        table = read_targets(folder / "a.csv", task)
        assert table.value.shape == (len(table.at), len(table.names))


def try_sample(folder: Path, data: bytes) -> None:
    from vaflow.train.submit import read_sample

    (folder / "sample.txt").write_bytes(data)
    assert read_sample(folder / "sample.txt")


def try_failures(folder: Path, data: bytes) -> None:
    root = folder / "data"
    root.mkdir()
    (root / "a.mp4").touch()
    (folder / "failures.jsonl").write_bytes(data)
    assert only_failed(open_dataset(root, "videos"), folder).clips
