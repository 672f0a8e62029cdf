"""`vaflow ablate` through the command line."""

import csv
import json
from pathlib import Path

import pytest
from ablation_toys import GRID, grid_file
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cli import main

SMALL = ["--set", "hidden=8", "--set", "epochs=1"]
ALIASES = ["--alias", f"clip-vit-b16={VISUAL}", "--alias", f"ast={AUDIO}"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("command") / "cache", Toy(seconds=(6, 9))).path


@pytest.fixture(scope="module")
def built_in(cache: Path) -> Path:
    """The built-in tables with one seed, trained once for all tests of this file."""
    return cache.parent / "out"


@pytest.mark.slow
def test_built_in_tables_on_other_encoders(cache: Path, built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["ablate", str(cache), "--out", str(built_in), "--seeds", "1", *ALIASES, *SMALL])
    assert code == 3, "two rows need streams that the cache lacks"
    printed = capsys.readouterr()
    with (built_in / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lacking = [row["row"] for row in rows if row["seeds"] == "0"]
    assert lacking == [
        "ViT-B/32 + CNN-based audio",
        "ResNet + VGGish + log-Mel, TCN, cross-modal attention, concatenation",
    ]
    runs = {row["runs"] for row in rows if row["runs"]}
    assert len(list((built_in / "runs").iterdir())) == len(runs)
    for row in rows:
        assert row["row"] in printed.out
    assert f"{len(runs)} runs trained, 0 reused" in printed.out
    *_, to_add, last = printed.err.strip().splitlines()
    for part in ("--visual clip-vit-b32", "--visual resnet50", "--audio vggish"):
        assert part in to_add
    assert last.endswith(str(built_in / "failures.jsonl"))


def test_json_output_is_one_document(cache: Path, built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ablate", str(cache), "--out", str(built_in), "--table", "2", "--table", "3", "--seeds", "1", "--json"]
    assert main([*command, *ALIASES, *SMALL]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [len(rows) for rows in document["tables"].values()] == [6, 2]
    assert document["runs"]["failed"] == 0
    assert document["full_model"]["fusion"] == "hierarchical"
    assert all(Path(path).is_file() for path in document["files"].values())
    assert document["failures"] == []


def test_quiet_prints_nothing(cache: Path, built_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ablate", str(cache), "--out", str(built_in), "--table", "3", "--seeds", "1", "-q"]
    assert main([*command, *ALIASES, *SMALL]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_user_grid_is_run(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_file(tmp_path, GRID)
    out = tmp_path / "out"
    code = main(["ablate", str(cache), "--out", str(out), "--grid", str(grid), "--table", "one", "--seeds", "1"])
    assert code == 0
    assert "Table one: First" in capsys.readouterr().out
    assert main(["ablate", str(cache), "--out", str(out), "--grid", str(grid), "--table", "2"]) == 2
    assert "Choices: all, one, two" in capsys.readouterr().err


def test_ablate_fails_if_all_rows_fail(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", str(cache), "--out", str(tmp_path / "out"), "--table", "p2", "--seeds", "1"]) == 1
    assert "failures.jsonl" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "4"], "Unknown table"),
        (["--seeds", "0"], "--seeds must be >= 1"),
        (["--jobs", "0"], "--jobs must be >= 1"),
        (["--alias", "ast"], "NAME=OTHER"),
        (["--alias", f"asd={AUDIO}"], "Did you mean 'ast'"),
        (["--set", "hiden=4"], "Did you mean 'hidden'"),
        (["--set", "hidden"], "KEY=VALUE"),
        (["--grid", "nowhere.toml"], "Cannot read the tables"),
    ],
)
def test_usage_errors_are_reported(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["ablate", str(cache), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.csv").exists()
