"""`vaflow search`: search space, early stopping, resumption, unbiased report."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache, open_cache
from vaflow.cli import main
from vaflow.errors import CorruptError, UsageError
from vaflow.train.config import TrainConfig, read_settings
from vaflow.train.evaluate import evaluate_run
from vaflow.train.folds import split_items
from vaflow.train.run_record import from_json
from vaflow.train.search_space import (
    DONE,
    FAILED,
    STOPPED,
    Choice,
    Log,
    Range,
    Space,
    Trial,
    continues,
    importances,
    propose,
    read_space,
    rungs,
)

pytest.importorskip("optuna")

SPACE = """
epochs = 3
batch_size = 8
lr = { low = 1e-4, high = 3e-2, log = true }
hidden = [8, 12]
"""
TOY = Space({}, {"lr": Range(1e-5, 1e-2, log=True), "temporal": Choice(("gru", "tcn"))})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = Toy(splits={"train": 4, "val": 2}, seconds=(6, 9))
    return make_cache(tmp_path_factory.mktemp("search") / "cache", toy).path


@pytest.fixture(scope="module")
def command(cache: Path) -> list[str]:
    space = cache.parent / "space.toml"
    space.write_text(SPACE)
    return ["search", str(cache), "--space", str(space), "--folds", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def searched(command: list[str], cache: Path) -> Path:
    """A search of five trials."""
    out = cache.parent / "out"
    assert main([*command, "--trials", "5", "--out", str(out)]) == 0
    return out


@pytest.fixture
def continued(searched: Path, cache: Path, command: list[str], tmp_path: Path) -> tuple[list[str], Path, Cache]:
    """The command that continues a copy of the search on a copy of the cache; the copies."""
    out, changed = tmp_path / "out", tmp_path / "cache"
    shutil.copytree(searched, out)
    shutil.copytree(cache, changed)
    arguments = [str(changed) if argument == str(cache) else argument for argument in command]
    return [*arguments, "--trials", "1", "--out", str(out)], out, open_cache(changed, writable=True)


def space_of(tmp_path: Path, text: str) -> Space:
    path = tmp_path / "space.toml"
    path.write_text(text)
    return read_space(path)


def trial(number: int, *scores: float, state: str = DONE) -> Trial:
    return Trial(number, {"lr": 1e-3, "temporal": "gru"}, state, rungs=scores)


def test_lists_are_choices_and_tables_are_ranges(tmp_path):
    space = space_of(
        tmp_path, SPACE + "dropout = { low = 0.0, high = 0.5, step = 0.1 }\nlayers = { low = 1, high = 3 }\n"
    )
    assert space.fixed == {"epochs": 3, "batch_size": 8}
    assert space.searched == {
        "lr": Range(1e-4, 3e-2, log=True),
        "hidden": Choice(("8", "12")),
        "dropout": Range(0.0, 0.5, step=0.1),
        "layers": Range(1, 3, whole=True),
    }
    config = space.config({"lr": 0.01, "hidden": "12", "dropout": 0.1, "layers": 2})
    assert config == TrainConfig(epochs=3, batch_size=8, lr=0.01, hidden=12, dropout=0.1, layers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1e-3", "nothing to search"),
        ("speed = [1, 2]", "Unknown setting"),
        ("hidden = [8, 8]", "two different choices"),
        ("hidden = [8]", "two different choices"),
        ('hidden = [8, "wide"]', "hidden must be"),
        ('fusion = ["gated", "guess"]', "Unknown value of --fusion"),
        ("lr = { low = 1e-2, high = 1e-3 }", "range of lr is not valid"),
        ("lr = { low = 0.0, high = 1e-3, log = true }", "range of lr is not valid"),
        ("lr = { low = 1e-4, high = 1e-3, steps = 3 }", "range of lr is not valid"),
        ("dropout = { low = 0.1, high = 2.0 }", "dropout must be"),
        ("fusion = { low = 1, high = 2 }", "must be"),
        ("fold = [1, 2]", "the search sets it"),
        ('fold_groups = "groups.csv:speaker"', "the search sets it"),
        ("lr = ", "is not TOML"),
    ],
)
def test_an_invalid_search_space_is_rejected(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        space_of(tmp_path, text)


def test_proposals_lie_in_the_space_and_are_deterministic():
    for sampler in ("bayes", "random"):
        done: list[Trial] = []
        for number in range(1, 16):
            values = propose(TOY, done, (), sampler, seed=1)
            assert values == propose(TOY, done, (), sampler, seed=1)
            assert 1e-5 <= values["lr"] <= 1e-2
            assert values["temporal"] in ("gru", "tcn")
            state = (DONE, STOPPED, FAILED)[number % 3]
            done.append(
                Trial(number, values, state, rungs=() if state == FAILED else (-abs(math.log10(values["lr"]) + 3),))
            )
        assert propose(TOY, done, (), sampler, seed=2) != propose(TOY, done, (), sampler, seed=1)


def test_bayes_search_beats_random_search():
    def distance(sampler: str) -> float:
        trials: list[Trial] = []
        for number in range(1, 31):
            values = propose(TOY, trials, (), sampler, seed=0)
            score = -abs(math.log10(values["lr"]) + 4) - (values["temporal"] == "gru")
            trials.append(Trial(number, values, DONE, rungs=(score,)))
        return float(np.mean([trial.score for trial in trials[-10:]]))

    assert distance("bayes") > distance("random") + 0.2


def test_the_most_important_setting_has_the_largest_share():
    rng = np.random.default_rng(0)
    trials = []
    for number in range(1, 41):
        power = rng.uniform(-5, -2)
        values = {"lr": float(10**power), "temporal": str(rng.choice(["gru", "tcn"]))}
        trials.append(Trial(number, values, DONE, rungs=(-abs(power + 3),)))
    shares = importances(TOY, trials)
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(TOY, trials[:3]) == {}


def test_rungs_are_a_ninth_a_third_and_all_of_the_epochs():
    assert rungs(TrainConfig(epochs=27), halving=True) == (3, 9, 27)
    assert rungs(TrainConfig(epochs=2), halving=True) == (2,)
    assert rungs(TrainConfig(epochs=27), halving=False) == (27,)
    assert rungs(TrainConfig(epochs=27, schedule="cosine"), halving=True) == (27,)


def test_the_best_third_continues():
    others = [trial(1, 0.5, 0.6), trial(2, 0.1, state=STOPPED), trial(3, state=FAILED), trial(4, 0.3, 0.4)]
    assert continues(0.55, 0, others)
    assert continues(0.5, 0, others)
    assert not continues(0.2, 0, others)
    assert continues(0.7, 1, others)
    assert not continues(0.5, 1, others)
    assert continues(0.0, 0, [])


def test_a_truncated_last_line_is_dropped_and_other_damage_reported(tmp_path):
    log = Log(tmp_path / "trials.jsonl")
    log.add(trial(1, 0.5))
    log.add(trial(2, 0.6))
    whole = log.path.read_text()
    log.path.write_text(whole + '{"number": 3, "val')
    assert Log.read(log.path) == log
    assert log.path.read_text() == whole
    log.path.write_text(whole.replace('"state"', '"mood"'))
    with pytest.raises(CorruptError, match="is damaged"):
        Log.read(log.path)


def test_search_results_are_written(searched):
    with (searched / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((searched / "search.json").read_text())
    assert [row["trial"] for row in rows] == ["1", "2", "3", "4", "5"]
    done = [row for row in rows if row["state"] == DONE]
    best = max(done, key=lambda row: float(row["ccc_mean"]))
    assert report["best"]["trial"] == int(best["trial"])
    assert report["best"]["selected_ccc"] == pytest.approx(float(best["ccc_mean"]), abs=1e-6)
    settings = read_settings(searched / "best.toml")
    assert (settings["epochs"], settings["hidden"]) == (3, int(best["hidden"]))
    assert settings["lr"] == pytest.approx(float(best["lr"]))
    page = (searched / "search.html").read_text()
    assert "which no trial saw" in page
    assert page.count("<circle") == len([row for row in rows if row["ccc_mean"]])
    assert "http" not in page.split("<body")[1].replace("http://www.w3.org", "")


def test_trials_never_read_the_held_out_split(searched, cache):
    held_out = set(open_cache(cache).items(split="val"))
    for path in searched.glob("runs/*/*/clips.json"):
        splits = from_json(path.read_text(), str(path))
        clips = {item for split in splits.values() for item in split}
        assert clips == set(open_cache(cache).items(split="train"))
        assert not clips & held_out
    report = json.loads((searched / "search.json").read_text())
    runs = [searched / "runs" / f"trial{report['best']['trial']:04d}" / f"fold{fold}" for fold in (1, 2)]
    scores = [evaluate_run(run, open_cache(cache), "val", device="cpu", write=False)["ccc"]["mean"] for run in runs]
    assert report["holdout_ccc"]["mean"] == pytest.approx(np.mean(scores), abs=1e-12)
    assert report["holdout_ccc"]["mean"] != report["best"]["selected_ccc"]


def test_a_killed_search_resumes_to_the_same_result(searched, command, cache, monkeypatch):
    import vaflow.train.repeats as runs

    out, train, calls = cache.parent / "killed", runs.train_run, []

    def dying(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(runs, "train_run", dying)
    assert main([*command, "--trials", "5", "--out", str(out)]) == 130
    monkeypatch.setattr(runs, "train_run", train)
    assert main([*command, "--trials", "3", "--out", str(out)]) == 0
    assert main([*command, "--trials", "5", "--out", str(out)]) == 0
    tables = []
    for folder in (searched, out):
        with (folder / "trials.csv").open(newline="") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_another_search_in_the_directory_is_rejected(searched, command, tmp_path, capsys):
    other = tmp_path / "space.toml"
    other.write_text(SPACE.replace("[8, 12]", "[8, 16]"))
    changed = [*command[:3], str(other), *command[4:]]
    assert main([*changed, "--out", str(searched)]) == 2
    assert "started differently. Got: other searched" in capsys.readouterr().err
    assert main([*command, "--seed", "3", "--out", str(searched)]) == 2
    assert "Got: other options" in capsys.readouterr().err


def test_trials_on_other_clips_are_not_continued(continued, capsys):
    command, _, cache = continued
    assert main(command) == 0
    assert main(["cache", "drop", str(cache.path), cache.items(split="train")[0], "-q"]) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "started differently. Got: other clips." in capsys.readouterr().err


def test_trials_on_other_prompts_are_not_continued(continued, capsys):
    command, _, cache = continued
    arrays = dict(cache.read("toy-eyes.text", "default").arrays)
    cache.write("toy-eyes.text", "more", arrays)  # no trial uses it
    assert main([*command, "-q"]) == 0
    cache.write("toy-eyes.text", "default", arrays, source={"prompts": {"templates": ["{}"]}})
    assert main(command) == 2
    assert "started differently. Got: other prompts." in capsys.readouterr().err


def test_a_held_out_split_of_recordings_that_trials_see_is_rejected(command, cache, tmp_path, capsys):
    twins = tmp_path / "twins"
    shutil.copytree(cache, twins)
    opened = open_cache(twins, writable=True)
    for item in ("train0", "val0"):
        one = opened.read("toy-eyes", item)
        opened.write("toy-eyes", item, dict(one.arrays), meta=dict(one.meta), source={"video": {"blake2b": "ab"}})
    arguments = [str(twins) if argument == str(cache) else argument for argument in command]
    assert main([*arguments, "--trials", "1", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "train0 and val0" in message and "shared_sources = true in the space" in message
    assert main([*command, "--trials", "1", "--holdout", "rest1of2", "--out", str(tmp_path / "out")]) == 2
    assert "--holdout rest1of2 holds clips of the split that is searched (train)" in capsys.readouterr().err


def test_warnings_about_the_held_out_split_are_printed(continued, capsys):
    command, out, cache = continued
    for item in cache.items(split="val"):
        labels = cache.read("labels", item)
        cache.write("labels", item, {**labels.arrays, "valid": labels.valid & [True, False]}, meta=dict(labels.meta))
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "warning: arousal is not labelled in this split" in printed.err and "CCC arousal" not in printed.out
    assert "arousal is not labelled in this split" in (out / "search.html").read_text()
    assert "arousal is not labelled in this split" in json.loads((out / "search.json").read_text())["warnings"]


def test_a_run_directory_is_not_searched_in(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").touch()
    for arguments in ([*command, "--trials", "1"], ["ablate", command[1], "--table", "3"]):
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
        assert "is a run directory. Choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_incompatible_settings_fail_one_trial(command, tmp_path, capsys):
    space = tmp_path / "space.toml"
    space.write_text("epochs = 1\nhidden = 10\nattention_heads = 4\nfusion = ['attention', 'attention-concat']\n")
    code = main([*command[:3], str(space), *command[4:], "--trials", "2", "--out", str(tmp_path / "out"), "--json"])
    printed = capsys.readouterr()
    assert code == 1
    assert json.loads(printed.out)["states"] == {"done": 0, "stopped": 0, "failed": 2}
    assert "must be divisible by" in printed.err


def test_streams_missing_from_the_cache_are_rejected_before_the_search(command, tmp_path, capsys):
    space = tmp_path / "space.toml"
    space.write_text(SPACE + 'visual = "clip-vit-b16"\n')
    assert main([*command[:3], str(space), *command[4:], "--out", str(tmp_path / "out")]) == 2
    assert "clip-vit-b16" in capsys.readouterr().err


def test_invalid_arguments_are_reported(command, tmp_path, capsys):
    for extra, message in (
        (["--sampler", "grid"], "Unknown --sampler"),
        (["--folds", "1"], "--folds must be >= 2"),
        (["--folds", "99"], "Cannot divide train into 99 folds"),
        (["--holdout", "train"], "--holdout must be another split"),
        (["--holdout", "tset"], "No clip of"),
        (["--trials", "0"], "--trials must be >= 1"),
    ):
        assert main([*command, "--out", str(tmp_path / "out"), *extra]) == 2
        assert message in capsys.readouterr().err


def test_outer_folds_score_clips_that_the_search_never_read(command, cache, tmp_path, capsys):
    out = tmp_path / "nested"
    nested = [*command, "--outer-folds", "2", "--trials", "2", "--out", str(out)]
    assert main([*nested, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "nested.json").read_text())
    opened = open_cache(cache)
    scores, tested = [], []
    for fold in (1, 2):
        held_out = set(split_items(opened, f"fold{fold}of2", ("train", "val")))
        tested += sorted(held_out)
        for path in (out / f"outer{fold}").glob("runs/*/*/clips.json"):
            clips = {item for split in from_json(path.read_text(), str(path)).values() for item in split}
            assert clips == set(opened.items()) - held_out
        scores.append(json.loads((out / f"outer{fold}" / "search.json").read_text())["holdout_ccc"]["mean"])
    assert sorted(tested) == sorted(opened.items())
    assert document["holdout_ccc"]["mean"]["folds"] == pytest.approx(scores)
    assert main([*command, "--outer-folds", "2", "--holdout", "test", "--out", str(out)]) == 2
    assert "--outer-folds divides all clips" in capsys.readouterr().err


@pytest.mark.slow  # two searches
def test_the_batch_size_does_not_change_random_proposals(searched, command, cache):
    """Nor early stops: a trial is compared with trials of lower numbers only."""
    tables = []
    for batch in (1, 3):
        out = cache.parent / f"batch{batch}"
        options = ["--trials", "4", "--sampler", "random", "--batch", str(batch), "--together", "always"]
        assert main([*command, *options, "--out", str(out)]) == 0
        with (out / "trials.csv").open(newline="") as file:
            tables.append([(row["trial"], row["state"], row["lr"], row["hidden"]) for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
