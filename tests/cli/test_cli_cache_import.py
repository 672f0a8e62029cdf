"""`vaflow cache import`: exit codes, messages, and `cache info` on the result."""

import json
from pathlib import Path

import numpy as np
import pytest

from vaflow.cli import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three items at 25 rows per second, one with missing rows; labels and splits for two."""
    (tmp_path / "f").mkdir()
    (tmp_path / "va").mkdir()
    for item in ("a", "b", "c"):
        rows = np.random.default_rng(0).normal(size=(50, 4))
        rows[3:5] = np.nan
        np.save(tmp_path / "f" / f"{item}.npy", rows)
    for item in ("a", "b"):
        (tmp_path / "va" / f"{item}.csv").write_text("frame,valence\n0,0.5\n7,0.25\n")
    (tmp_path / "va" / "splits.csv").write_text("name,split\na,train\nb,val\nc,test\n")
    return tmp_path


def run(data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    args = ["cache", "import", str(data / "cache"), "--stream", "mine", "--kind", "audio", "--from", str(data / "f")]
    code = main([*args, *more])
    out, err = capsys.readouterr()
    return code, out, err


def labels(data: Path) -> tuple[str, str]:
    return "--labels", str(data / "va")


def test_import_then_info_lists_the_items(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(data, capsys, "--rate", "25", *labels(data))
    assert (code, err) == (0, "")
    for part in ("Imported 3 of 3 items into stream 'mine', 150 rows", "missing: 6.", "Labels: 2 of 3 items, 4 rows."):
        assert part in out
    assert main(["cache", "info", str(data / "cache"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["splits"] == {"test": 1, "train": 1, "val": 1} and info["items"] == 3
    stream = info["streams"]["mine"]
    assert (stream["kind"], stream["dim"], stream["items"], stream["encoder"]) == ("audio", 4, 3, "imported")
    assert main(["cache", "verify", str(data / "cache")]) == 0


def test_a_second_import_reports_nothing_to_do(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, capsys, "--rate", "25", *labels(data))
    code, out, _ = run(data, capsys, "--rate", "25", *labels(data))
    assert code == 0 and "Imported 0 of 3 items" in out and "Up to date: 3." in out
    np.save(data / "f" / "b.npy", np.zeros((9, 4)))
    assert "files have changed: 1." in run(data, capsys, "--rate", "25", *labels(data))[1]


def test_partial_failure_exits_with_3(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(data / "f" / "b.npy", np.zeros((9, 5)))
    code, out, err = run(data, capsys, "--rate", "25", "--json", "-q")
    document = json.loads(out)
    assert code == 3 and document["imported"] == 2 and [f["item"] for f in document["failures"]] == ["b"]
    assert err.splitlines()[-1].endswith(str(data / "cache" / "failures.jsonl"))
    (line,) = (data / "cache" / "failures.jsonl").read_text().splitlines()
    assert json.loads(line).keys() >= {"item", "stage", "error", "message"}


def test_complete_failure_exits_with_1(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(data, capsys)
    assert code == 1 and "--rate HZ" in err and "3 items failed" in err


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--kind", "smell"), "audio, visual"),
        (("--rate", "-1"), "positive"),
        (("--from", "/nowhere"), "does not exist"),
        (("--store", "tar"), "Unknown store"),
        (("--dtype", "int8"), "float16, float32"),
    ],
)
def test_invalid_options_exit_with_2(
    data: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], part: str
) -> None:
    code, out, err = run(data, capsys, *more)
    assert code == 2 and out == "" and part in err and len(err.splitlines()) == 1


def test_changed_settings_are_rejected_by_name(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, capsys, "--rate", "25")
    code, _, err = run(data, capsys, "--rate", "30")
    assert code == 2 and "sampling.rate: cache has 25.0, now 30.0" in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "import", "--help"]) == 0
    out = capsys.readouterr().out
    assert "vaflow cache import my.cache" in out and "--labels" in out


def test_labels_that_may_not_belong_to_the_features_are_a_warning(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {"a": ["frame,valence", *(f"{k},0" for k in range(300))], "b": ["time,valence", "0,0", "9,0"]}
    tables["c"] = ["frame,time,valence", *(f"{k},{k / 10},0" for k in range(50))]
    for item, lines in tables.items():
        (data / "va" / f"{item}.csv").write_text("\n".join(lines) + "\n")
    code, _, err = run(data, capsys, "--rate", "25", *labels(data))
    assert code == 0
    a, b, c = sorted(err.splitlines(), key=lambda line: line[-1])
    assert a.startswith("The number of label rows does not fit") and a.endswith("(--label-rate HZ): a")
    assert b == "The labels continue after the features: b"
    assert c.endswith("(--columns ignore=frame uses time): c")
    assert run(data, capsys, "--rate", "25", *labels(data), "--label-rate", "150")[2] == f"{b}\n"


def test_items_without_a_feature_file_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, capsys, "--rate", "25")[0] == 0
    (data / "f" / "b.npy").unlink()
    code, _, err = run(data, capsys, "--rate", "25")
    assert code == 0 and f"1 item of stream 'mine' has no feature file in {data / 'f'}: b" in err
    assert f"To remove items from every stream of the cache: vaflow cache drop {data / 'cache'} b" in err
    assert json.loads(run(data, capsys, "--rate", "25", "--json")[1])["absent"] == ["b"]
