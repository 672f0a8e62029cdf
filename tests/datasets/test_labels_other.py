"""Label readers of AFEW-VA, RECOLA, SEWA and MuSe, against brute-force restatements."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_trees import BUILDERS, expected_value

from vaflow.datasets import DIMENSION_READERS, READERS, open_dataset, read_annotation
from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.labels import DimensionLabels, merge_dimensions, on_clock, with_gaps
from vaflow.errors import DataError

NEW = ("afew-va", "recola", "sewa", "muse")
FRAMES = np.array([0.0, 0.04, 0.08, 0.12, 0.2, 0.24])


def clip_of(path: Path, layout: str) -> Clip:
    dimensions = (("arousal", path),) if layout in DIMENSION_READERS else ()
    return Clip("a", None, "a", None, labels=path, label_format=layout, dimensions=dimensions)


def read(folder: Path, text: str | bytes, layout: str) -> Annotation:
    path = folder / "labels.any"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    annotation = read_annotation(clip_of(path, layout))
    assert annotation is not None
    return annotation


def refusal(folder: Path, text: str | bytes, layout: str) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, text, layout)
    message = str(caught.value)
    assert "labels.any" in message and "\n" not in message
    return message


# --- written labels are read back (loop over frames and rows)


@pytest.mark.parametrize("layout", NEW)
def test_labels_are_read_for_every_frame(tmp_path: Path, layout: str) -> None:
    tree = BUILDERS[layout](tmp_path)
    some_missing = False
    for clip in open_dataset(tmp_path).clips:
        annotation = read_annotation(clip)
        clock = on_clock(annotation, tree[clip.id].times)
        expected = expected_value(layout, tree[clip.id])
        np.testing.assert_allclose(clock["value"], expected, atol=1e-6)
        np.testing.assert_array_equal(clock["valid"], np.isfinite(expected))
        some_missing |= annotation is not None and not clock["valid"].all()
        if annotation is not None:
            assert annotation.targets == tuple(t for t in ("valence", "arousal") if t in tree[clip.id].rows)
    assert some_missing, "the tree has labels that are missing"


def test_gaps_between_segments_are_unlabelled(tmp_path: Path) -> None:
    rows = ["0,0.1,1", "250,0.2,1", "500,0.3,1", "750,0.4,2", "2000,0.5,3", "2250,0.6,3"]
    annotation = read(tmp_path, "\n".join(["timestamp,value,segment_id", *rows]), "muse")
    times = np.arange(0, 2.35, 0.05)
    known = on_clock(annotation, times)["valid"][:, 1]
    for time, labelled in zip(times, known, strict=True):
        assert labelled == (time <= 0.875 + 1e-9 or time > 1.875 + 1e-9), time


# --- formats


def test_afew_va_values_are_divided_by_ten_per_frame(tmp_path: Path) -> None:
    frames = {"00007": {"valence": -10, "arousal": 3.0}, "00002": {"valence": None, "arousal": 10}, "00004": {}}
    annotation = read(tmp_path, json.dumps({"frames": frames}), "afew-va")
    assert annotation.frame is not None and annotation.frame.tolist() == [2, 4, 7]
    np.testing.assert_array_equal(annotation.value, np.array([[np.nan, 1], [np.nan, np.nan], [-1, 0.3]], np.float32))


def test_recola_columns_may_have_any_order_and_case(tmp_path: Path) -> None:
    arff = (
        "% made\n@RELATION x\n@Attribute GOLDSTANDARD numeric\n@attribute 'frametime' real\n@DATA\n0.5,0.04\n?,0.08\n"
    )
    table = "Gold Standard;frame time;other\n0.5;0.04;x\nNaN;0.08;y\n"
    for text in (arff, table):
        annotation = read(tmp_path, text, "recola")
        assert annotation.time is not None and annotation.time.tolist() == [0.04, 0.08]
        np.testing.assert_array_equal(annotation.value[:, 1], np.array([0.5, np.nan], np.float32))


@pytest.mark.parametrize(
    "text",
    [
        "'Train_01';0.0;0.5;-0.5;0.1\n'Train_01';0.1;0.25;-0.25;0.1\n",
        "0.0;0.5;-0.5\n0.1;0.25;-0.25\n",
        "Name;timeStamp;arousal;valence\na;0.0;0.5;-0.5\na;0.1;0.25;-0.25\n",
        "timestamp;valence;arousal\n0.0;-0.5;0.5\n0.1;-0.25;0.25\n",
    ],
)
def test_sewa_files_with_and_without_header_are_read(tmp_path: Path, text: str) -> None:
    annotation = read(tmp_path, text, "sewa")
    assert annotation.time is not None and annotation.time.tolist() == [0.0, 0.1]
    np.testing.assert_array_equal(annotation.value, np.array([[-0.5, 0.5], [-0.25, 0.25]], np.float32))


@pytest.mark.parametrize(
    ("layout", "text", "parts"),
    [
        ("afew-va", "", ["no JSON"]),
        ("afew-va", "[" * 100_000, ["no JSON"]),
        ("afew-va", "[]", ["without an object 'frames'"]),
        ("afew-va", '{"frames": {}}', ["no frames"]),
        ("afew-va", '{"frames": {"a": {}, "-1": {}, "99999999": {}}}', ["'a' is not a frame", "'-1'", "'99999999'"]),
        ("afew-va", '{"frames": {"1": {}, "01": {}, "2": 3}}', ["'01' is listed twice", "frame 2 is not an object"]),
        (
            "afew-va",
            '{"frames": {"1": {"valence": 11, "arousal": "x"}, "2": {"valence": NaN, "arousal": true}}}',
            ["valence of frame 1 is 11", "arousal of frame 1 is not a number ('x')", "frame 2 is nan", "(bool)"],
        ),
        ("recola", "", ["an empty file"]),
        ("recola", "time;FM1\n0;0\n", ["the fields 'time, FM1'"]),
        ("recola", "@attribute frameTime numeric\n@attribute GoldStandard numeric\n@data\n", ["no rows"]),
        ("recola", "frameTime;GoldStandard\n0;2\n0;x\n1\n", ["line 2 ('2')", "line 3 ('x')", "line 3 ('0')", "line 4"]),
        ("sewa", "a;b\n", ["line 1 ('a;b')"]),
        ("sewa", "timestamp;arousal;valence\n", ["no rows"]),
        ("sewa", "0.1;0;0\n0.1;0;9\n", ["line 2 ('0.1')", "line 2 ('9')"]),
        ("muse", "timestamp,value\n0,0\n", ["timestamp,value"]),
        ("muse", "timestamp,value,segment_id\n0,7,1\n-1,0,1\n", ["line 2 ('7')", "milliseconds", "line 3 ('-1')"]),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, layout: str, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text, layout)
    for part in parts:
        assert part in message, (part, message)


def test_a_missing_file_is_an_item_error(tmp_path: Path) -> None:
    for layout in NEW:
        with pytest.raises(DataError, match=r"gone\.x"):
            read_annotation(clip_of(tmp_path / "gone.x", layout))


CELLS = st.sampled_from(["0.5", "-5", "", "x", "1e9", "0", " 1 ", "nan", "?", "'a'", "250", "1e-320", "3e307"])
HEADS = {
    "recola": ["frameTime;GoldStandard", "name;frameTime;GoldStandard", "@attribute frameTime real\n@data", ""],
    "sewa": ["name;timestamp;arousal;valence;liking", "timestamp;arousal;valence", "timestamp;arousal", ""],
    "muse": ["timestamp,value,segment_id", "segment_id,timestamp,value", "timestamp,value", ""],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-12, 12) | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from(["1", "02", "x", "valence", "arousal", "frames"]), inner, max_size=4),
)


def assert_read_or_refused(folder: Path, text: str | bytes, layout: str) -> None:
    try:
        annotation = read(folder, text, layout)
    except DataError:
        return
    value = annotation.value
    assert value.shape[1] == 2 and value.dtype == np.float32 and len(value)
    assert (np.isnan(value) | (np.abs(value) <= 1)).all()
    clock = on_clock(annotation, FRAMES)
    assert {len(array) for array in clock.values()} == {len(clock["time"])}
    assert len(clock["time"]) >= FRAMES.size and (np.diff(clock["time"]) > 0).all()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), layout=st.sampled_from(sorted(HEADS)), noise=st.text(max_size=20) | st.binary(max_size=20))
def test_arbitrary_text_yields_an_annotation_or_a_data_error(tmp_path_factory, data, layout, noise) -> None:
    head = data.draw(st.sampled_from(HEADS[layout]))
    columns = head.count(";") + head.count(",") + 1
    rows = st.lists(CELLS, min_size=columns, max_size=columns) | st.lists(CELLS, max_size=5)
    body = data.draw(st.lists(rows, max_size=8))
    separator = "," if "," in head or "@" in head else ";"
    tail = noise if isinstance(noise, bytes) else noise.encode("utf-8", "surrogatepass")
    text = "\n".join([head, *(separator.join(row) for row in body)]).encode() + tail
    assert_read_or_refused(tmp_path_factory.mktemp("any"), text, layout)


@settings(max_examples=200, deadline=None)
@given(document=JSON | st.fixed_dictionaries({"frames": JSON}), cut=st.integers(0, 40), noise=st.binary(max_size=5))
def test_arbitrary_json_yields_an_annotation_or_a_data_error(tmp_path_factory, document, cut, noise) -> None:
    text = json.dumps(document)
    assert_read_or_refused(tmp_path_factory.mktemp("any"), text.encode(), "afew-va")
    assert_read_or_refused(tmp_path_factory.mktemp("any"), text[:cut].encode() + noise, "afew-va")


def test_every_format_has_one_reader() -> None:
    assert set(READERS).isdisjoint(DIMENSION_READERS) and set(NEW) <= READERS.keys() | DIMENSION_READERS.keys()


# --- two files, one clock


def trace(start: int, rows: int, step: int, seed: int) -> DimensionLabels:
    """Whole ticks of 1/64 s, which binary numbers hold exactly."""
    value = np.random.default_rng(seed).uniform(-1, 1, rows).astype(np.float32)
    return DimensionLabels((start + step * np.arange(rows)) / 64, value)


@given(st.integers(1, 8), st.integers(0, 9))
def test_dimensions_with_equal_times_are_joined(rows: int, seed: int) -> None:
    valence, arousal = trace(0, rows, 16, seed), trace(0, rows, 16, seed + 1)
    both = merge_dimensions({"arousal": arousal, "valence": valence})
    np.testing.assert_array_equal(both.time, valence.time)
    np.testing.assert_array_equal(both.value, np.stack([valence.value, arousal.value], axis=1))


@given(st.integers(2, 8), st.integers(2, 8), st.integers(-40, 40), st.integers(0, 9))
def test_dimensions_with_different_times_keep_all_labels(first: int, second: int, shift: int, seed: int) -> None:
    """Assert that each row's value appears at its time, within half an interval."""
    traces = {"valence": trace(64, first, 16, seed), "arousal": trace(64 + shift, second, 16, seed + 1)}
    both = merge_dimensions(traces)
    assert both.time is not None and (np.diff(both.time) > 0).all()
    for column, target in enumerate(("valence", "arousal")):
        for time, value in zip(traces[target].time, traces[target].value, strict=True):
            near = np.abs(both.time - time) <= 8 / 64
            assert value in both.value[near, column], (target, time)


def test_filling_gaps_does_not_change_labelled_rows() -> None:
    time = np.array([0.0, 0.25, 0.5, 1.0, 1.25, 3.0])
    breaks = np.array([False, False, True, False, True])
    gapped = with_gaps(DimensionLabels(time, np.arange(6, dtype=np.float32)), breaks)
    assert gapped.time.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.75, 3.0]
    assert gapped.value[np.isfinite(gapped.value)].tolist() == [0, 1, 2, 3, 4, 5]
