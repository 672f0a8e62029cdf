"""`vaflow train` and `vaflow evaluate` through the command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from vaflow.cache import Cache
from vaflow.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from synthetic_cache import Toy, make_cache

SMALL = ["--set", "hidden=16", "--lr", "3e-3", "--batch-size", "8", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cli") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", str(cache.path), "--out", str(out), *SMALL, "-q"]) == 0
    return out


def test_a_second_train_reports_a_finished_run(cache: Cache, tmp_path: Path, capsys) -> None:
    command = ["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "CCC within videos" in first.out and "best epoch" in first.out
    assert "epoch  2/2" in first.err and "Share of labelled frames per region" in first.err
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().out


def test_json_and_quiet_do_not_need_what_only_the_text_shows(cache: Cache, run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["pearson"]  # as in metrics of a version that did not compute it
    file.write_text(json.dumps(metrics))
    command = ["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics
    assert main([*command, "-q"]) == 0
    assert not capsys.readouterr().out


def test_an_out_below_a_file_is_rejected(cache: Cache, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["train", str(cache.path), "--out", str(tmp_path / "file" / "run"), *SMALL]) == 2
    assert f"Cannot write --out {tmp_path / 'file' / 'run'}" in capsys.readouterr().err


def test_settings_combine_presets_files_and_options(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("seed = 4\nepochs = 9\nsigma = 0.6\nvisual = ['toy-eyes']\naudio = ['toy-ears']\n")
    options = ["--preset", "p2", "--config", str(file), "--sigma", "0.5", *SMALL, "--epochs", "1", "--kl-weight", "0"]
    out = tmp_path / "run"
    assert main(["train", str(cache.path), "--out", str(out), *options, "--set", "lr=1e-2", "-q"]) == 0
    from vaflow.train.run_folder import require_record

    config = require_record(out).config
    assert (config.temporal, config.fusion) == ("tcn", "attention-concat")  # from the preset
    assert (config.seed, config.visual) == (4, ("toy-eyes",))  # from the file
    assert (config.sigma, config.epochs, config.kl_weight) == (0.5, 1, 0.0)  # from the options
    assert config.lr == 1e-2  # --set


def test_evaluate_prints_the_scores_of_metrics_json(run: Path, capsys) -> None:
    assert main(["evaluate", str(run), "--json", "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((run / "metrics.json").read_text())
    assert printed == {key: written[key] for key in printed}
    assert main(["evaluate", str(run), "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("train:") and "95 % interval" in out
    assert (run / "predictions" / "train" / "train0.csv").is_file()


def test_evaluate_on_another_cache(run: Path, cache: Cache, tmp_path: Path, capsys) -> None:
    other = make_cache(tmp_path / "other", Toy(seed=9))
    assert main(["evaluate", str(run), "--cache", str(other.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_clips"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "hiden=3"], "Did you mean 'hidden'"),
        (["--set", "hidden"], "KEY=VALUE"),
        (["--temporal", "grru"], "Did you mean 'gru'"),
        (["--visual", "clip"], "Choices: toy-eyes"),
        (["--visual", "none", "--audio", "none"], "nothing to train on"),
        (["--preset", "p1"], "clip-vit-b16"),
        (["--preset", "p9"], "Choices: p1, p2"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--set", "val_split=test"], "Choices: train, val"),
        (["--window", "2", "--stride", "3", "--frames", "4"], "stride"),
        (["--window", "0.001"], "--window must be a number >= 0.1"),
        (["--stride", "0.001"], "--stride must be a number >= 0.01"),
        (["--device", "tpu"], "cuda"),
        (["--set", "hidden=15"], "even"),
    ],
)
def test_usage_errors_are_explained(cache: Cache, tmp_path: Path, capsys, options: list[str], message: str) -> None:
    assert main(["train", str(cache.path), "--out", str(tmp_path / "run"), "--epochs", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_changed_settings_of_a_finished_run_are_rejected(cache: Cache, run: Path, capsys) -> None:
    assert main(["train", str(cache.path), "--out", str(run), *SMALL, "--seed", "3"]) == 2
    assert "seed: 0, not 3" in capsys.readouterr().err


def test_directories_without_a_run_or_cache_are_rejected(cache: Cache, tmp_path: Path, capsys) -> None:
    assert main(["train", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]) == 2
    assert main(["evaluate", str(tmp_path / "absent")]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main(["evaluate", str(cache.path)]) == 2


def test_evaluate_rejects_missing_labelled_clips(run: Path, tmp_path: Path, capsys) -> None:
    cache = make_cache(tmp_path / "c", Toy(seconds=(8, 14)))
    for stream in ("toy-eyes", "toy-ears"):
        cache.drop(stream, "val2")
    command = ["evaluate", str(run), "--cache", str(cache.path)]
    assert main(command) == 1
    assert "--allow-missing" in capsys.readouterr().err
    assert main([*command, "--allow-missing"]) == 0
    assert "1 clip without features" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_has_an_example(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: vaflow {command}" in capsys.readouterr().out


def test_json_prints_only_the_metrics(cache: Cache, tmp_path: Path, capsys) -> None:
    assert main(["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_fresh_retrains_from_scratch(cache: Cache, tmp_path: Path, capsys) -> None:
    command = ["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*command, "-q"]) == 0
    assert main([*command, "--seed", "3"]) == 2
    assert "--fresh" in capsys.readouterr().err
    assert main([*command, "--seed", "3", "--fresh", "-q"]) == 0


def test_more_epochs_and_auto(cache: Cache, tmp_path: Path, capsys) -> None:
    command = ["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*command, "-q"]) == 0
    assert main([*command, "--epochs", "3"]) == 0
    assert "Resuming after epoch 2 of 3" in capsys.readouterr().err
    assert main([*command, "--epochs", "auto", "--set", "patience=1"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] > 3
    for wrong in ("0", "-1", "some"):
        assert main([*command, "--epochs", wrong]) == 2
        assert "--epochs must be an integer >= 1 or auto" in capsys.readouterr().err
