"""`vaflow folds`, `vaflow ensemble` and the options of `vaflow evaluate`."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.train.heads.temporal import TCN

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from synthetic_cache import Toy, make_cache

SMALL = ["--set", "hidden=8", "--lr", "1e-2", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cli") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", str(cache.path), "--out", str(out), *SMALL]) == 0
    return out


def printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_folds_are_shown_and_trained_on(cache: Cache, tmp_path: Path, capsys) -> None:
    command = ["folds", str(cache.path), "--folds", "3"]
    facts = printed([*command, "--json"], capsys)
    assert [part["fold"] for part in facts] == [1, 2, 3]
    assert sorted(clip for part in facts for clip in part["clips"]) == cache.items()
    assert main([*command, "-v"]) == 0
    out = capsys.readouterr().out
    assert "labelled frames" in out and f"fold 3: {', '.join(facts[2]['clips'])}" in out
    assert printed([*command, "--split", "train", "--json"], capsys) != facts
    fold = ["--folds", "3", "--fold", "2", "--out", str(tmp_path / "run")]
    assert main(["train", str(cache.path), *fold, *SMALL]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["split"] == "fold2of3" and metrics["n_clips"] == len(facts[1]["clips"])
    assert main(["folds", str(cache.path), "--folds", "99"]) == 2
    assert "source videos" in capsys.readouterr().err


def test_an_ensemble_is_printed_and_written(run: Path, cache: Cache, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    assert main(["train", str(cache.path), "--out", str(other), *SMALL, "--seed", "1"]) == 0
    command = ["ensemble", str(run), str(other), "--out", str(tmp_path / "both"), "--weights", "search"]
    metrics = printed([*command, "--json"], capsys)
    assert metrics == json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert main(command) == 0
    output = capsys.readouterr()
    assert "weights" in output.out and str(other) in output.out and "warning: the weights were tuned" in output.err
    assert main([*command[:-1], "best"]) == 2
    assert "Choices: ccc, mean, search" in capsys.readouterr().err


def test_smooth_is_stored_until_removed(run: Path, capsys) -> None:
    command = ["evaluate", str(run), "--device", "cpu"]
    plain = printed([*command, "--json"], capsys)
    assert main(["smooth", str(run), "--kind", "savgol", "--seconds", "1.5"]) == 0
    assert "savgol, 1.5 s" in capsys.readouterr().out
    stored = printed([*command, "--json"], capsys)
    assert stored["smoothing"]["seconds"] == 1.5 and stored["ccc"] != plain["ccc"]
    auto = printed(["smooth", str(run), "--kind", "mean", "--json"], capsys)
    assert auto["chosen_on"] == "val" and auto["scores"]["0"] == pytest.approx(plain["ccc"]["mean"])
    assert printed([*command, "--json"], capsys)["ccc"]["mean"] >= plain["ccc"]["mean"] - 1e-9
    assert main(command) == 0
    assert "tuned on this split; the score is optimistic" in capsys.readouterr().out
    assert main(["smooth", str(run), "--kind", "none"]) == 0
    assert "Removed" in capsys.readouterr().out
    assert printed([*command, "--json"], capsys) == plain


def test_evaluate_smooth_affects_that_evaluation_only(run: Path, capsys) -> None:
    command = ["evaluate", str(run), "--device", "cpu"]
    plain = printed([*command, "--json"], capsys)
    assert main([*command, "--smooth", "savgol", "--smooth-seconds", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "smoothed: savgol, 1.5 s" in out and "optimistic" not in out
    assert printed([*command, "--json"], capsys) == plain
    for wrong, message in (
        (["--smooth", "median"], "Choices"),
        (["--smooth", "mean", "--smooth-seconds", "x"], "auto"),
        (["--smooth-seconds", "2"], "requires --smooth"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_quiet_prints_no_table(run: Path, capsys) -> None:
    assert main(["evaluate", str(run), "--device", "cpu", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_one_video_has_no_interval(tmp_path: Path, capsys) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 3, "val": 1}, seconds=(8, 14)))
    out = tmp_path / "run"
    assert main(["train", str(cache.path), "--out", str(out), *SMALL]) == 0
    assert main(["evaluate", str(out), "--device", "cpu"]) == 0
    assert "needs at least two source videos" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ci95"] == {"valence": [None, None], "arousal": [None, None], "mean": [None, None]}


def test_unknown_items_of_groups_are_named(run: Path, tmp_path: Path, capsys) -> None:
    groups = tmp_path / "groups.csv"
    groups.write_text("item,gender\nval0,f\nval9,m\n")
    assert main(["evaluate", str(run), "--device", "cpu", "--groups", str(groups)]) == 0
    err = capsys.readouterr().err
    assert "val9" in err and "val0" not in err


def test_folds_by_a_column(cache: Cache, tmp_path: Path, capsys) -> None:
    groups = tmp_path / "groups.csv"
    items = cache.items()
    rows = [f"{item},s{k % 3}" for k, item in enumerate(items)]
    groups.write_text("\n".join(["item,speaker", *rows]) + "\n")
    command = ["folds", str(cache.path), "--folds", "3", "--fold-groups", f"{groups}:speaker"]
    facts = printed([*command, "--json"], capsys)
    assert [part["speaker"] for part in facts] != [] and all(len(part["speaker"]) == 1 for part in facts)
    for part in facts:
        assert part["clips"] == [item for k, item in enumerate(items) if f"s{k % 3}" == part["speaker"][0]]
    fold = ["--folds", "3", "--fold", "2", "--fold-groups", f"{groups}:speaker", "--out", str(tmp_path / "run")]
    assert main(["train", str(cache.path), *fold, *SMALL]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n_clips"] == len(facts[1]["clips"])
    for wrong, message in ((f"{groups}:age", "Choices: speaker"), (str(groups), "FILE:COLUMN")):
        assert main([*command[:-1], wrong]) == 2
        assert message in capsys.readouterr().err


def test_folds_of_a_cache_without_a_validation_split(tmp_path: Path, capsys) -> None:
    cache = make_cache(tmp_path / "cache", Toy(seconds=(8, 14), splits={"train": 4}))
    assert main(["folds", str(cache.path), "--folds", "2"]) == 0
    assert "Clips divided: 4 of split train" in capsys.readouterr().out
    assert main(["folds", str(cache.path), "--folds", "2", "--split", "vla"]) == 2


def test_evaluate_without_a_modality_and_by_group(run: Path, tmp_path: Path, capsys) -> None:
    groups = tmp_path / "groups.csv"
    groups.write_text("item,gender\nval0,f\nval1,m\nval2,f\n")
    command = ["evaluate", str(run), "--device", "cpu", "--groups", str(groups)]
    assert main([*command, "--without", "visual"]) == 0
    out = capsys.readouterr().out
    assert "without visual" in out and "gender" in out
    metrics = printed([*command, "--json"], capsys)
    assert {group: part["n_clips"] for group, part in metrics["by_group"]["gender"].items()} == {"f": 2, "m": 1}
    assert json.loads((run / "metrics.json").read_text())["by_group"] == metrics["by_group"]
    assert set(metrics["by_intensity"]) == {"valence", "arousal"}
    assert main(["evaluate", str(run), "--without", "sound"]) == 2


@pytest.mark.parametrize("command", ["folds", "ensemble", "train", "evaluate"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: vaflow {command}" in " ".join(capsys.readouterr().out.split())


PAGE = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S) for line in block.splitlines()
]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the inputs of the documented commands."""
    folder = tmp_path_factory.mktemp("page")
    cache = make_cache(folder / "affwild2.cache", Toy(splits={"train": 5, "val": 3}, seconds=(6, 9)))
    (folder / "groups.csv").write_text("item,gender\nval0,f\nval1,m\n")
    (folder / "EXPR_Set").mkdir()
    for item in cache.items():
        (folder / "EXPR_Set" / f"{item}.txt").write_text("Neutral,Happy\n" + "0\n1\n-1\n1\n" * 5)
    return folder


@pytest.mark.parametrize("line", COMMANDS)  # in the order of the page: later ones use the runs of earlier ones
def test_the_documented_command_runs(line: str, sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(sandbox)
    program, *arguments = shlex.split(line)
    assert program == "vaflow"
    quick = ["--set", "hidden=8", "--epochs", "1", "--device", "cpu"] if arguments[0] == "train" else []
    assert main([*arguments, *quick]) == 0, capsys.readouterr().err


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the last table below a heading, without its head."""
    part = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"][2:]


def test_the_documentation_states_the_tcn_receptive_field() -> None:
    head = re.search(r"^\| `layers` \|(.*)\|$", PAGE, re.M)
    steps = next(row[1:] for row in table_rows(PAGE, "Temporal models") if row[0] == "steps")
    assert head is not None
    layers = [int(cell.split()[0]) for cell in head[1].split("|")]
    assert [int(cell) for cell in steps] == [TCN(4, 4, layers=count).receptive_field for count in layers]
    default = next(cell for cell in head[1].split("|") if "default" in cell)
    assert int(default.split()[0]) == len(TCN(4, 4).blocks)
