"""`vaflow train --seeds` and `--all-folds`, and what ends a run of a batch, through the command line."""

import json
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cli import main
from vaflow.files import read_tensors
from vaflow.train.training_loop import save_checkpoint

SETTINGS = ["--set", "hidden=8", "--set", "attention_heads=2", "--set", "batch_size=4", "--device", "cpu"]
GRID = f"""
[base]
visual = ["{VISUAL}"]
audio = ["{AUDIO}"]
hidden = 8
attention_heads = 2
batch_size = 4
epochs = 2
device = "cpu"

[table.one]

[[table.one.row]]
name = "full"

[[table.one.row]]
name = "diverging"
lr = 1e38
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = Toy(splits={"train": 2, "val": 2}, seconds=(7, 9))
    return make_cache(tmp_path_factory.mktemp("repeats") / "cache", toy).path


def ablate(cache: Path, folder: Path, out: Path, *options: str, grid: str = GRID) -> int:
    file = folder / "grid.toml"
    file.write_text(grid)
    return main(["ablate", str(cache), "--out", str(out), "--grid", str(file), *options])


def same_weights(one: Path, other: Path) -> None:
    first, second = (read_tensors(run / "model.safetensors")[0] for run in (one, other))
    for name in second:
        if not name.endswith("in_proj_bias"):  # the bias of an attention's keys has no effect
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)


def test_every_fold_and_seed_writes_the_files_of_a_single_run(cache, tmp_path, capsys):
    many = ["train", str(cache), *SETTINGS, "--epochs", "2", "--folds", "2"]
    out = tmp_path / "cv"
    command = [*many, "--all-folds", "--seeds", "2", "--together", "always", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["runs"]) == ["fold1-seed0", "fold1-seed1", "fold2-seed0", "fold2-seed1"]
    assert report["ccc"]["mean"]["mean"] == pytest.approx(sum(s["mean"] for s in report["runs"].values()) / 4)
    assert report == json.loads((out / "repeats.json").read_text())
    assert main([*many, "--fold", "2", "--seed", "1", "--out", str(tmp_path / "one")]) == 0
    same_weights(out / "fold2-seed1", tmp_path / "one")
    capsys.readouterr()
    assert main(command) == 0
    assert "fold2-seed1" in capsys.readouterr().out


def test_warnings_of_the_runs_are_printed(tmp_path, capsys):
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 1, "val": 1}, seconds=(4, 5), targets=(0,)))
    command = ["train", str(cache.path), *SETTINGS, "--epochs", "1", "--seeds", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--together", "always"]) == 0
    assert "seed0, seed1: arousal is not labelled in this split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--all-folds"], "requires --folds"),
        (["--seeds", "0"], "--seeds must be >= 1"),
        (["--seeds", "2", "--weights", "toy=x.pt"], "exclude --weights"),
        (["--seeds", "2", "--finetune"], "not supported with --finetune"),
        (["--seeds", "2", "--together", "often"], "Unknown --together"),
    ],
)
def test_incompatible_options_are_rejected(cache, tmp_path, capsys, options, message):
    assert main(["train", str(cache), *SETTINGS, "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_other_settings_leave_the_results_of_an_earlier_command(cache, tmp_path, capsys):
    command = ["train", str(cache), "--out", str(tmp_path / "out"), *SETTINGS, "--epochs", "1", "--seeds", "2"]
    assert main([*command, "-q"]) == 0
    before = (tmp_path / "out" / "repeats.json").read_text()
    capsys.readouterr()
    assert main([*command, "--lr", "1e-2"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("holds a run with other settings") == 2 and not printed.out
    assert (tmp_path / "out" / "repeats.json").read_text() == before
    assert main([*command, "--lr", "1e-2", "--fresh", "--visual", "absent"]) == 2, (
        "settings that do not fit delete nothing"
    )
    assert (tmp_path / "out" / "repeats.json").read_text() == before
    assert main([*command, "--lr", "1e-2", "--fresh", "-q"]) == 0
    assert (tmp_path / "out" / "repeats.json").read_text() != before


def test_a_diverging_run_is_reported_and_the_others_finish(cache, tmp_path, capsys):
    assert ablate(cache, tmp_path, tmp_path / "out", "--seeds", "2", "--together", "always") == 3
    stderr = capsys.readouterr().err
    assert stderr.count("failed: table one, diverging") == 2
    assert "not finite" in stderr
    assert len(list((tmp_path / "out" / "runs").glob("*/metrics.json"))) == 2


@pytest.mark.slow  # test_together interrupts batches
def test_an_interrupted_batch_resumes_to_the_same_results(cache, tmp_path, monkeypatch):
    grid = GRID.split('[[table.one.row]]\nname = "diverging"')[0]
    options = ("--seeds", "2", "--together", "always", "-q")
    assert ablate(cache, tmp_path, tmp_path / "whole", *options, grid=grid) == 0
    saved: list[Path] = []

    def stop_in_the_second_epoch(path, *state):
        save_checkpoint(path, *state)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vaflow.train.stacked_loop.save_checkpoint", stop_in_the_second_epoch)
        assert ablate(cache, tmp_path, tmp_path / "parts", *options, grid=grid) == 130
    assert ablate(cache, tmp_path, tmp_path / "parts", *options, grid=grid) == 0
    runs = sorted(path.name for path in (tmp_path / "whole" / "runs").iterdir())
    assert runs == sorted(path.name for path in (tmp_path / "parts" / "runs").iterdir())
    for name in runs:
        one, other = (tmp_path / place / "runs" / name for place in ("whole", "parts"))
        same_weights(one, other)
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())


def test_a_worker_death_in_a_batch_loses_no_run(cache, tmp_path):
    """The runs of its batch train one by one in another process, from their checkpoints."""
    grid = GRID.split('[[table.one.row]]\nname = "diverging"')[0].replace("epochs = 2", "epochs = 30")
    out = tmp_path / "out"
    killed: list[str] = []

    def kill() -> None:
        while not killed and not list(out.glob("runs/*/metrics.json")):
            workers = active_children()
            if workers and list(out.glob("runs/*/checkpoint.safetensors")):
                workers[0].kill()
                killed.append(workers[0].name)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    code = ablate(cache, tmp_path, out, "--seeds", "4", "--jobs", "2", "--together", "always", "-q", grid=grid)
    killer.join()
    assert killed
    assert code == 0
    assert len(list(out.glob("runs/*/metrics.json"))) == 4


def test_groups_that_do_not_fit_are_a_usage_error_of_the_command(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "groups.csv").write_text("clip,gender\ntrain0,f\n")
    folds = ["--folds", "2", "--all-folds", "--fold-groups", f"{tmp_path / 'groups.csv'}:speaker"]
    assert main(["train", str(cache), "--out", str(tmp_path / "cv"), *SETTINGS, "--epochs", "1", *folds]) == 2
    assert "no column 'speaker'" in capsys.readouterr().err
