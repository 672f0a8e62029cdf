"""Imported features: cache contents against the files, rejected input, repeated imports."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaflow.cache import create_cache, open_cache
from vaflow.cache.maintenance import verify
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.errors import DataError, FingerprintError, UsageError
from vaflow.extract.importing import ImportConfig, ImportSummary, import_features
from vaflow.extract.importing.feature_files import find_features, read_features, signature
from vaflow.files import Failure, read_failures, write_failures

RNG = np.random.default_rng(0)


def save(folder: Path, item: str, rows: np.ndarray, times: np.ndarray | None = None) -> None:
    path = folder / f"{item}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    if times is not None:
        np.save(folder / f"{item}.time.npy", times)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def bring(tmp: Path, kind: str = "visual", *, cache: str = "cache", **options: object) -> ImportSummary:
    labels = tmp / "labels" if (tmp / "labels").is_dir() else None
    names = ("rate", "dtype")
    config = ImportConfig("mine", kind, **{name: options.pop(name) for name in names if name in options})  # type: ignore[arg-type]
    return import_features(tmp / cache, tmp / "from", config, labels=labels, **options)  # type: ignore[arg-type]


def failed(summary: ImportSummary) -> dict[str, str]:
    lines = [json.loads(line) for line in Path(summary.failures_file).read_text().splitlines()]
    assert [line["item"] for line in lines] == [failure.item for failure in summary.failures]
    return {line["item"]: line["message"] for line in lines}


# --- written arrays


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
@pytest.mark.parametrize("kind", ["visual", "audio"])
def test_rows_and_times_are_imported(tmp_path: Path, kind: str, store: str) -> None:
    rows: dict[str, np.ndarray] = {"a": RNG.normal(size=(7, 3)), "sub/b": RNG.normal(size=(4, 3)).astype(np.float32)}
    times = {"a": np.cumsum(RNG.uniform(0.1, 2, 7)), "sub/b": np.arange(4.0)}
    for item in rows:
        save(tmp_path / "from", item, rows[item], times[item])
    summary = bring(tmp_path, kind, store=store, dtype="float32")
    assert (summary.imported, summary.labelled, summary.rows, summary.masked) == (2, 2, 11, 0)
    cache = open_cache(tmp_path / "cache")
    assert cache.store == store and cache.items() == ["a", "sub/b"] and verify(cache) == []
    for item in rows:
        stored = cache.read("mine", item)
        line = (lambda array: array[0]) if kind == "audio" else (lambda array: array)
        if kind == "audio":
            assert stored.embedding.shape == (1, *rows[item].shape) and stored.start.tolist() == [0.0]
        np.testing.assert_array_equal(line(stored.embedding), rows[item].astype(np.float32))
        np.testing.assert_array_equal(line(stored.time), times[item])
        assert line(stored.valid).all()
        labels = cache.read(LABELS, item)
        np.testing.assert_array_equal(labels.time, times[item])
        assert not labels.valid.any() and cache.meta(item)["split"] is None
        gaps = np.sort(np.diff(times[item]))
        assert cache.meta(item)["duration"] == pytest.approx(times[item][-1] + np.median(gaps))


def test_a_steady_rate_and_one_dimension(tmp_path: Path) -> None:
    save(tmp_path / "from", "a", np.arange(6).reshape(6, 1))
    bring(tmp_path, rate=0.2)
    cache = open_cache(tmp_path / "cache")
    assert cache.read("mine", "a").time.tolist() == [0, 5, 10, 15, 20, 25]
    assert cache.meta("a")["duration"] == 30
    assert cache.streams()["mine"].identity["sampling"] == {"rate": 0.2}


def test_feature_tables_are_imported(tmp_path: Path) -> None:
    text(tmp_path / "from" / "a.csv", "f0,Time,energy", "1,0.5,2", "3,1.5,", "nan,2.5,4", "5,3.5,-6e-1")
    summary = bring(tmp_path)
    stored = open_cache(tmp_path / "cache").read("mine", "a")
    assert stored.time.tolist() == [0.5, 1.5, 2.5, 3.5] and summary.masked == 2
    assert stored.valid.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(stored.embedding, np.array([[1, 2], [0, 0], [0, 0], [5, -0.6]], np.float16))


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.5, -2.0, np.nan, np.inf, -np.inf]), min_size=2, max_size=2), min_size=1)
)
@settings(deadline=None, max_examples=30)
def test_rows_that_are_not_finite_are_masked_and_counted(tmp_path_factory, rows) -> None:
    tmp = tmp_path_factory.mktemp("nan")
    save(tmp / "from", "a", np.array(rows), np.arange(float(len(rows))))
    (file,) = find_features(tmp / "from")
    features = read_features(file, None)
    good = [all(np.isfinite(row)) for row in rows]
    assert features.valid.tolist() == good
    for row, ok, stored in zip(rows, good, features.embedding, strict=True):
        np.testing.assert_array_equal(stored, row if ok else np.zeros(2))


# --- labels


def test_labels_by_time_keep_their_times(tmp_path: Path) -> None:
    save(tmp_path / "from", "a", RNG.normal(size=(10, 2)))
    save(tmp_path / "from", "b", RNG.normal(size=(10, 2)))
    text(tmp_path / "labels" / "a.csv", "time,arousal", "0.1,0.5", "0.2,-5", "12.0,-0.5")
    text(tmp_path / "labels" / "splits.csv", "name,split", "a,train", "b,val")
    bring(tmp_path, rate=5)
    cache = open_cache(tmp_path / "cache")
    labels = cache.read(LABELS, "a")
    assert labels.time.tolist() == [0.1, 0.2, 12.0]
    np.testing.assert_array_equal(labels.value[:, 1], np.array([0.5, np.nan, -0.5], np.float32))
    assert labels.valid.tolist() == [[False, True], [False, False], [False, True]]
    meta = cache.meta("a")
    assert (meta["split"], meta["group"], meta["targets"], meta["rows"]) == ("train", "a", ["arousal"], 3)
    assert meta["duration"] == pytest.approx(12.0 + np.median([0.1, 11.8]))
    assert cache.items(split="val") == ["b"] and not cache.read(LABELS, "b").valid.any()


def test_labels_by_frame_count_the_rows_of_the_features(tmp_path: Path) -> None:
    times = np.array([0.0, 0.5, 0.7, 2.0])
    save(tmp_path / "from", "a", RNG.normal(size=(4, 2)), times)
    text(tmp_path / "labels" / "a.csv", "frame,valence,arousal", "1,0.5,0.25", "3,-0.5,")
    bring(tmp_path)
    labels = open_cache(tmp_path / "cache").read(LABELS, "a")
    np.testing.assert_array_equal(labels.time, times)
    assert labels.valid.tolist() == [[False, False], [True, True], [False, False], [True, False]]
    assert labels.value[1].tolist() == [0.5, 0.25] and labels.value[3, 0] == -0.5


def test_arrays_and_label_tables_can_share_a_directory(tmp_path: Path) -> None:
    save(tmp_path / "from", "a", RNG.normal(size=(3, 2)))
    text(tmp_path / "from" / "a.csv", "time,valence", "0,0.5")
    text(tmp_path / "from" / "splits.csv", "name,split", "a,test")
    summary = import_features(
        tmp_path / "cache", tmp_path / "from", ImportConfig("mine", "audio", 1), labels=tmp_path / "from"
    )
    assert summary.imported == 1 and summary.failures == []
    assert open_cache(tmp_path / "cache").items(split="test") == ["a"]


@pytest.mark.parametrize(("features", "labels"), [("root", "root/va"), ("root/f", "root")])
def test_features_and_labels_may_be_nested_directories(tmp_path: Path, features: str, labels: str) -> None:
    text(tmp_path / features / "a.csv", "time,f", "0,1")
    text(tmp_path / labels / "a.csv" if labels != features else tmp_path, "time,valence", "0,0.5")
    summary = import_features(
        tmp_path / "cache", tmp_path / features, ImportConfig("mine", "visual"), labels=tmp_path / labels
    )
    assert summary.failures == [] and open_cache(tmp_path / "cache").read(LABELS, "a").valid.any()


# --- repeated import


def test_a_second_import_writes_only_changed_items(tmp_path: Path) -> None:
    for item in "abc":
        save(tmp_path / "from", item, RNG.normal(size=(5, 2)), np.arange(5.0))
    text(tmp_path / "labels" / "a.csv", "time,valence", "0,0.5")
    bring(tmp_path)
    cache = open_cache(tmp_path / "cache")

    def attempts() -> dict[tuple[str, str], str]:
        return {(s, item): cache.record(s, item).attempt for s in ("mine", LABELS) for item in "abc"}

    first = attempts()
    summary = bring(tmp_path)
    assert (summary.imported, summary.labelled, summary.done) == (0, 0, 3) and attempts() == first

    save(tmp_path / "from", "b", RNG.normal(size=(6, 2)), np.arange(6.0))
    text(tmp_path / "labels" / "a.csv", "time,valence", "0,0.75")
    text(tmp_path / "labels" / "c.csv", "time,valence", "0,0.25")
    summary = bring(tmp_path)
    assert (summary.imported, summary.changed, summary.labelled, summary.done) == (1, 1, 3, 0)
    assert {key for key, attempt in attempts().items() if attempt != first[key]} == {
        ("mine", "b"),
        (LABELS, "a"),
        (LABELS, "b"),
        (LABELS, "c"),
    }
    assert len(cache.read("mine", "b").time) == len(cache.read(LABELS, "b").time) == 6
    assert cache.read(LABELS, "a").value[0, 0] == 0.75

    (tmp_path / "labels" / "c.csv").unlink()
    text(tmp_path / "labels" / "splits.csv", "name,split", "a,train", "b,train", "c,val")
    assert bring(tmp_path).labelled == 3
    assert not cache.read(LABELS, "c").valid.any() and cache.meta("c")["split"] == "val"
    assert bring(tmp_path).done == 3 and verify(open_cache(tmp_path / "cache")) == []


def test_a_second_stream_keeps_labels_and_splits(tmp_path: Path) -> None:
    save(tmp_path / "from", "a", RNG.normal(size=(5, 2)))
    text(tmp_path / "labels" / "a.csv", "time,valence", "0,0.5")
    text(tmp_path / "labels" / "splits.csv", "name,split", "a,train")
    bring(tmp_path, rate=1)
    save(tmp_path / "other", "a", RNG.normal(size=(50, 4)))
    save(tmp_path / "other", "new", RNG.normal(size=(50, 4)))
    summary = import_features(tmp_path / "cache", tmp_path / "other", ImportConfig("ears", "audio", 10))
    cache = open_cache(tmp_path / "cache")
    assert (summary.imported, summary.labelled) == (2, 1), "only the new item needs a clock"
    assert cache.meta("a")["split"] == "train" and cache.read(LABELS, "a").valid.any()
    assert cache.items() == ["a", "new"] and cache.items(stream="mine") == ["a"]


def test_an_import_without_a_folder_of_labels_keeps_those_of_the_cache(tmp_path: Path) -> None:
    for item, times in (("own", np.arange(5.0)), ("rows", np.arange(5.0) + 0.5)):
        save(tmp_path / "from", item, RNG.normal(size=(5, 2)), times)
    text(tmp_path / "labels" / "own.csv", "time,valence", "0.25,0.5", "0.75,0.25")
    text(tmp_path / "labels" / "rows.csv", "frame,valence", "0,0.5", "4,0.25")
    bring(tmp_path)
    cache = open_cache(tmp_path / "cache")
    before = {item: cache.read(LABELS, item) for item in cache.items()}

    def again(stream: str = "mine", folder: str = "from") -> ImportSummary:
        return import_features(tmp_path / "cache", tmp_path / folder, ImportConfig(stream, "visual"))

    def kept(item: str) -> bool:
        now, then = cache.read(LABELS, item), before[item]
        return np.array_equal(now.time, then.time) and np.array_equal(now.value, then.value, equal_nan=True)

    for item, times in (("own", np.arange(6.0)), ("rows", np.arange(5.0) + 0.5)):
        save(tmp_path / "from", item, RNG.normal(size=(len(times), 2)), times)
    assert (again().changed, again().done) == (2, 2) and kept("own") and kept("rows")
    assert cache.meta("own")["duration"] == 6

    save(tmp_path / "other", "own", RNG.normal(size=(3, 2)), np.arange(3.0))
    text(tmp_path / "other" / "splits.csv", "name,split,group", "own,val,speaker")
    assert again("other", "other").labelled == 1 and kept("own")
    assert (cache.meta("own")["split"], cache.meta("own")["group"]) == ("val", "speaker")

    save(tmp_path / "from", "rows", RNG.normal(size=(5, 2)), np.arange(5.0))
    assert "--labels DIR" in failed(again())["rows"] and kept("rows")
    assert bring(tmp_path).failures == [] and cache.read(LABELS, "rows").time[0] == 0


def test_features_can_be_added_to_an_extracted_cache(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "cache")
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": "labels", "decoder": {"backend": "x"}}))
    nothing = {"time": np.arange(3.0), "value": np.zeros((3, 2), np.float32), "valid": np.ones((3, 2), bool)}
    record = cache.write(LABELS, "a", nothing, source={"video": {"size": 1}}, meta={"split": "val", "duration": 3.0})
    save(tmp_path / "from", "a", RNG.normal(size=(5, 2)))
    save(tmp_path / "from", "b", RNG.normal(size=(5, 2)))
    write_failures(cache.path / "failures.jsonl", [Failure("c", "open", "MediaError", "empty")])
    summary = bring(tmp_path, rate=2)
    assert summary.imported == 1 and "has no item 'b'" in failed(summary)["b"]
    assert {failure.item for failure in read_failures(cache.path)} == {"b", "c"}, "of the import and of the extraction"
    assert open_cache(tmp_path / "cache").record(LABELS, "a") == record
    text(tmp_path / "labels" / "a.csv", "time,valence", "0,0.5")
    with pytest.raises(UsageError, match="Omit --labels"):
        bring(tmp_path, rate=2)


def test_changed_settings_require_another_stream_name(tmp_path: Path) -> None:
    save(tmp_path / "from", "a", RNG.normal(size=(5, 2)))
    bring(tmp_path, rate=2)
    for options, part in (({"rate": 3}, "sampling.rate"), ({"rate": 2, "dtype": "float32"}, "dtype")):
        with pytest.raises(FingerprintError, match=part):
            bring(tmp_path, **options)
    with pytest.raises(FingerprintError, match="kind"):
        bring(tmp_path, "audio", rate=2)
    with pytest.raises(UsageError, match="another store"):
        bring(tmp_path, rate=2, store="hdf5")


# --- rejected input


def test_an_import_in_which_all_items_fail_can_be_repeated_with_other_settings(tmp_path: Path) -> None:
    for item in ("a", "b"):
        save(tmp_path / "from", item, np.ones((4, 3)))
    assert len(bring(tmp_path).failures) == 2, "no times"
    assert "mine" not in open_cache(tmp_path / "cache").streams()
    assert bring(tmp_path, rate=5).imported == 2


def test_one_invalid_item_does_not_affect_the_others(tmp_path: Path) -> None:
    source, times = tmp_path / "from", np.arange(4.0)
    for item in ("good1", "good2"):
        save(source, item, RNG.normal(size=(4, 2)), times)
    save(source, "no-time", RNG.normal(size=(4, 2)))
    save(source, "short-time", RNG.normal(size=(4, 2)), times[:3])
    save(source, "back", RNG.normal(size=(4, 2)), times[::-1])
    save(source, "nan-time", RNG.normal(size=(4, 2)), times * np.nan)
    save(source, "wide", RNG.normal(size=(4, 3)), times)
    save(source, "flat", RNG.normal(size=4), times)
    save(source, "words", np.array([["a", "b"]]), times[:1])
    save(source, "empty", np.zeros((0, 2)), times[:0])
    save(source, "twice", RNG.normal(size=(4, 2)), times)
    text(source / "twice.csv", "time,x,y", "0,1,2")
    text(source / "table.csv", "time,x,y", "0,1,2")
    np.save(source / "lonely.time.npy", times)
    np.save(source / "object.npy", np.array([{}]), allow_pickle=True)
    (source / "torn.npy").write_bytes((source / "good1.npy").read_bytes()[:90])
    (source / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(40))
    (source / "text.npy").write_text("no array")
    save(source, "bad-labels", RNG.normal(size=(4, 2)), times)
    text(tmp_path / "labels" / "bad-labels.csv", "time,valence", "0,7")
    text(tmp_path / "labels" / "unknown.csv", "time,valence", "0,0")
    text(tmp_path / "labels" / "good1.csv", "time,valence", "0,0")
    summary = bring(tmp_path)
    messages = failed(summary)
    expected = {
        "no-time": "--rate HZ",
        "short-time": "4 times",
        "back": "2.0 at row 1 after 3.0",
        "nan-time": "nan at row 0",
        "wide": "3 dimensions",
        "flat": "float64 [4]",
        "words": "real numbers",
        "empty": "no rows",
        "twice": "twice.csv, twice.npy",
        "table": "columns",
        "lonely": "only lonely.time.npy",
        "object": "cannot be read",
        "torn": "torn.npy cannot be read",
        "zip": "zip.npy",
        "text": "text.npy cannot be read",
        "bad-labels": "line 2 ('7')",
        "unknown": "unknown has labels but no features",
    }
    assert messages.keys() == expected.keys()
    for item, part in expected.items():
        assert part in messages[item] and "\n" not in messages[item], (item, messages[item])
    assert summary.imported == 2 and open_cache(tmp_path / "cache").items() == ["good1", "good2"]


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ([""], "is empty"),
        (["time"], "no columns of features"),
        (["time,x,x", "0,1,2"], "empty or repeated column names"),
        (["time,x", "0,1,2"], "3 in line 2"),
        (["time,x", "0,1", "1,later"], "line 3"),
        (["time,x"], "no rows"),
        (["x", "1"], "a column 'time'"),
        (["time,x", "1,1", "1,1"], "ascending"),
    ],
)
def test_invalid_tables_are_rejected(tmp_path: Path, lines: list[str], part: str) -> None:
    text(tmp_path / "a.csv", *lines)
    (file,) = find_features(tmp_path)
    with pytest.raises(DataError) as caught:
        signature(file)
        read_features(file, None)
    assert part in str(caught.value)


def test_columns_in_another_order_are_not_the_same_features(tmp_path: Path) -> None:
    for item, header in {"a": "time,x,y", "b": "time,x,y", "c": "time,y,x"}.items():
        text(tmp_path / "from" / f"{item}.csv", header, "0,1,2")
    assert list(failed(bring(tmp_path))) == ["c"]


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }"
PIECES = st.sampled_from(
    ["(", "{", "'", "0", "-1", "99999999999999999999", "b''", ":", "None", "L", " 1", "\n", "\x00"]
)


@given(st.text(max_size=30).map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
@settings(deadline=None, max_examples=100)
def test_arbitrary_text_yields_features_or_a_data_error(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.csv").write_bytes(b"time,x\n0,1\n" + data)
    assert_read_or_refused(folder)


@given(st.integers(0, len(HEADER)), st.integers(0, 5), st.lists(PIECES, max_size=3), st.integers(0, 40))
@settings(deadline=None, max_examples=200)
@pytest.mark.filterwarnings("ignore:Reading")
def test_arbitrary_headers_yield_features_or_a_data_error(tmp_path_factory, at, dropped, pieces, size) -> None:
    folder = tmp_path_factory.mktemp("any")
    header = (HEADER[:at] + "".join(pieces) + HEADER[at + dropped :]).encode()
    length = len(header).to_bytes(2, "little")
    (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + length + header + bytes(size))
    assert_read_or_refused(folder)


def assert_read_or_refused(folder: Path) -> None:
    (file,) = find_features(folder)
    try:
        assert signature(file).dim >= 1
        features = read_features(file, 25.0)
    except DataError:
        return
    assert np.isfinite(features.embedding).all() and len(features.time) == len(features.valid) >= 1


@pytest.mark.parametrize(
    ("stream", "kind", "options", "part"),
    [
        ("x", "text", {}, "audio, visual"),
        ("x", "visual", {"rate": 0.0}, "positive"),
        ("x", "visual", {"rate": float("nan")}, "positive"),
        ("x", "visual", {"dtype": "float64"}, "float16, float32"),
        ("labels", "visual", {}, "another name"),
        ("clip.text", "visual", {}, "another name"),
    ],
)
def test_invalid_settings_are_rejected(stream: str, kind: str, options: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        ImportConfig(stream, kind, **options)  # type: ignore[arg-type]


def test_invalid_directories_are_rejected(tmp_path: Path) -> None:
    config = ImportConfig("mine", "visual")
    with pytest.raises(UsageError, match="folder of features does not exist"):
        import_features(tmp_path / "cache", tmp_path / "gone", config)
    (tmp_path / "from").mkdir()
    with pytest.raises(UsageError, match="holds no features"):
        import_features(tmp_path / "cache", tmp_path / "from", config)
    save(tmp_path / "from", "a", np.zeros((2, 2)))
    with pytest.raises(UsageError, match="folder of labels does not exist"):
        import_features(tmp_path / "cache", tmp_path / "from", config, labels=tmp_path / "gone")
    assert not (tmp_path / "cache").exists()


def test_missing_cells_of_a_table_make_their_row_invalid(tmp_path: Path) -> None:
    cells = ["1", "", "NaN", "NA", "n/a", "null", "?", "2"]
    text(tmp_path / "in" / "a.csv", "time,x,y", *(f"{k},{cell},0" for k, cell in enumerate(cells)))
    features = read_features(find_features(tmp_path / "in")[0], None)
    assert features.valid.tolist() == [True, *[False] * 6, True]
    assert features.embedding[:, 0].tolist() == [1, *[0] * 6, 2]
