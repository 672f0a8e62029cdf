"""Import of expression classes and action units in all supported formats."""

import json
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache
from vaflow.cache.maintenance import other_versions
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.cli import main
from vaflow.errors import DataError, FingerprintError, UsageError
from vaflow.extract.importing.labels import import_targets, read_targets

FRAMES = np.array([0.0, 0.04, 0.09, 0.12, 0.2])  # of variable rate
ABAW = ("Neutral", "Anger", "Other")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = create_cache(tmp_path / "cache")
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": "labels"}))
    for item in ("a", "sub/b"):
        value = np.full((len(FRAMES), 2), np.nan, np.float32)
        cache.write(LABELS, item, {"time": FRAMES, "value": value, "valid": np.isfinite(value)})
    return cache


def write(folder: Path, item: str, text: str, suffix: str = ".csv") -> Path:
    path = folder / f"{item}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_abaw_expressions_are_one_class_per_frame(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "expr", "a", "Neutral,Anger,Other\n0\n2\n-1\n1\n", ".txt")
    write(tmp_path / "expr", "sub/b", "Neutral,Anger,Other\n1\n1\n1\n1\n1\n1\n", ".txt")  # a row more than frames
    done = import_targets(cache, "expr", "classes", tmp_path / "expr")
    assert (done.written, done.rows, done.names) == (2, 9, ABAW)
    data = cache.read("expr", "a")
    np.testing.assert_array_equal(data.time, FRAMES[:4])
    assert data.valid.tolist() == [[True] * 3, [True] * 3, [False] * 3, [True] * 3]
    assert data.value[data.valid].reshape(3, 3).argmax(axis=1).tolist() == [0, 2, 1]
    assert data.value[data.valid].sum() == 3
    beyond = cache.read("expr", "sub/b").time
    assert len(beyond) == 6 and beyond[5] == pytest.approx(FRAMES[-1] + np.median(np.diff(FRAMES)))
    assert cache.streams()["expr"].identity == {"task": "classes", "names": list(ABAW)}


def test_targets_follow_frames_that_have_changed(cache: Cache, tmp_path: Path) -> None:
    """The clip is extracted again from another file; the table is the same."""
    write(tmp_path / "au", "a", "AU1,AU2\n0,1\n1,-1\n")
    assert import_targets(cache, "au", "binary", tmp_path / "au").written == 1
    labels = cache.read(LABELS, "a").arrays
    cache.write(LABELS, "a", {**labels, "time": FRAMES / 2})
    assert import_targets(cache, "au", "binary", tmp_path / "au").written == 1
    np.testing.assert_array_equal(cache.read("au", "a").time, FRAMES[:2] / 2)
    assert import_targets(cache, "au", "binary", tmp_path / "au").done == 1


def test_targets_of_an_earlier_video_are_known(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "au", "a", "AU1,AU2\n0,1\n1,-1\n")
    labels = cache.read(LABELS, "a").arrays
    for digest in ("1", "2"):
        cache.write(LABELS, "a", labels, source={"video": {"name": "a.mp4", "blake2b": digest}})
        assert other_versions(cache, ["au"], ["a"]) == ({} if digest == "1" else {"au": ["a"]})
        assert import_targets(cache, "au", "binary", tmp_path / "au").written == 1
        assert other_versions(cache, ["au"], ["a"]) == {}
    cache.write(LABELS, "a", labels, source={"video": {"name": "b.mp4", "blake2b": "2"}})
    assert import_targets(cache, "au", "binary", tmp_path / "au").done == 1


def test_abaw_action_units_are_one_column_each(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "au", "a", "AU1,AU2\n0,1\n1,-1\n-1,-1\n", ".txt")
    import_targets(cache, "au", "binary", tmp_path / "au")
    data = cache.read("au", "a")
    assert data.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert data.value[data.valid].tolist() == [0, 1, 1]
    assert not cache.has("au", "sub/b")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("time,class\n0.5,calm\n1.5,sad\n2.5,\n", [(0.5, "calm"), (1.5, "sad"), (2.5, None)]),
        ("frame,class\n4,calm\n1,sad\n2,-1\n", [(0.04, "sad"), (0.09, None), (0.2, "calm")]),
        ("class\n1\n0\n-1\n", [(0.0, "calm"), (0.04, "sad"), (0.09, None)]),
    ],
)
def test_classes_by_name_or_number_at_times_frames_or_row_by_row(
    cache: Cache, tmp_path: Path, text: str, rows: list[tuple[float, str | None]]
) -> None:
    write(tmp_path / "mood", "a", text)
    import_targets(cache, "mood", "classes", tmp_path / "mood", ["sad", "calm"])
    data = cache.read("mood", "a")
    imported = [
        ("sad", "calm")[int(v.argmax())] if ok.all() else None for v, ok in zip(data.value, data.valid, strict=True)
    ]
    assert list(zip(data.time.tolist(), imported, strict=True)) == rows


def test_class_shares_are_reported(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "votes", "a", "time,sad,calm\n0.0,0.25,0.75\n1.0,,\n")
    import_targets(cache, "votes", "classes", tmp_path / "votes")
    data = cache.read("votes", "a")
    assert data.value[0].tolist() == [0.25, 0.75] and data.valid.tolist() == [[True, True], [False, False]]


def test_a_second_target_import_writes_only_changes(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "au", "a", "AU1\n0\n")
    write(tmp_path / "au", "sub/b", "AU1\n1\n")
    import_targets(cache, "au", "binary", tmp_path / "au")
    kept = cache.record("au", "a").attempt
    write(tmp_path / "au", "sub/b", "AU1\n0\n1\n")
    done = import_targets(cache, "au", "binary", tmp_path / "au")
    assert (done.written, done.done) == (1, 1)
    assert cache.record("au", "a").attempt == kept and len(cache.read("au", "sub/b").time) == 2
    with pytest.raises(FingerprintError, match="classes"):
        write(tmp_path / "expr", "a", "AU1,AU2\n0\n")
        import_targets(cache, "au", "classes", tmp_path / "expr")


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("classes", "a,b\n0\n7\n", "line 3 .*'7', not one of 0 to 1"),
        ("classes", "a,b\nx\n", "line 2"),
        ("classes", "class\n1\n", "--names"),
        ("classes", "a,b\n0.5,0.6\n", "sum to 1"),
        ("binary", "a,b\n0,2\n", "within"),
        ("binary", "a,b\n0\n", "1 cells for 2"),
        ("binary", "time,a\nx,1\n", "line 2"),
        ("binary", "time,a\n-3,1\n", "numbers from 0 to 1000000"),
        ("binary", "time,a\n1,0\n2,0\n1,1\n", "each time once"),
        ("binary", "frame,a\n3,0\n3,1\n", "whole numbers, each once"),
        ("binary", "frame,a\n1.5,0\n", "whole numbers, each once"),
        ("binary", "a,a\n0,1\n", "two columns of one name"),
        ("binary", "time\n1\n", "no targets"),
        ("binary", "", "no targets"),
    ],
)
def test_invalid_target_rows_are_reported_with_line_numbers(tmp_path: Path, task: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_targets(write(tmp_path, "a", text), task)


def test_an_invalid_target_file_prevents_writing(cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "au", "a", "AU1\n0\n")
    write(tmp_path / "au", "sub/b", "AU2\n0\n")
    with pytest.raises(DataError, match="other names"):
        import_targets(cache, "au", "binary", tmp_path / "au")
    assert "au" not in cache.streams()
    with pytest.raises(UsageError, match="No clip of the cache"):
        import_targets(cache, "au", "binary", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="belongs to a stream"):
        import_targets(cache, LABELS, "binary", tmp_path / "au")
    with pytest.raises(UsageError, match="Choices: binary, classes"):
        import_targets(cache, "au", "units", tmp_path / "au")


def test_the_command(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "expr", "a", "Neutral,Anger,Other\n0\n2\n", ".txt")
    command = ["cache", "targets", str(cache.path), "--stream", "expr", "--task", "classes", "--from"]
    assert main([*command, str(tmp_path / "expr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "stream": "expr",
        "names": list(ABAW),
        "written": 1,
        "done": 0,
        "rows": 2,
        "unused": [],
    }
    write(tmp_path / "expr", "sub/c", "Neutral,Anger,Other\n0\n", ".txt")
    assert main([*command, str(tmp_path / "expr")]) == 0
    printed = capsys.readouterr()
    assert "1 up to date" in printed.out and "1 file of clips that the cache does not have: sub/c.txt" in printed.err
    assert main([*command, str(tmp_path / "none")]) == 2
    assert main(["cache", "verify", str(cache.path)]) == 0


def test_a_quoted_cell_keeps_its_line_break(tmp_path: Path) -> None:
    table = read_targets(write(tmp_path, "a", '"surprise\n(brief)",fear\n0\n1\n'), "classes")
    assert table.names == ("surprise\n(brief)", "fear")
    assert table.value.tolist() == [[1, 0], [0, 1]]
