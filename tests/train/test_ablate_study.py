"""Runs of a study: shared, reused, resumed, failed, killed; in one or several processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from ablation_toys import GRID, grid_file, toy_study
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache, write_labels
from synthetic_cache import SmoothPath as Curve

from vaflow.cache import Cache
from vaflow.errors import UsageError
from vaflow.train.ablate import StudyResult, run_study
from vaflow.train.ablate.pool import Outcome, run_all
from vaflow.train.ablate.tables import Options, add_command, make_schedule
from vaflow.train.config import BEFORE_SETTING, TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.folds import split_items
from vaflow.train.losses import ccc
from vaflow.train.run_folder import RunFolder, load_run, require_record
from vaflow.train.smoothing import Smoothing, write_smoothing


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ablate") / "cache")


@pytest.fixture(scope="module")
def done(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, Path]:
    """Both tables with two seeds, trained in this process."""
    folder = tmp_path_factory.mktemp("done")
    return run_study(cache, toy_study(folder), [], folder / "out", Options(seeds=2)), folder / "out"


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}


def numbers(out: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "runs"} for row in read_csv(out)]


def test_equal_configurations_are_trained_once(done: tuple[StudyResult, Path]) -> None:
    result, out = done
    assert result.about.trained == 6, "three configurations, two seeds"
    assert len(list((out / "runs").iterdir())) == 6
    rows = {row["row"]: row for row in read_csv(out)}
    assert rows["gated"]["runs"] == rows["gated again"]["runs"]
    assert rows["gated"]["ccc_mean"] == rows["gated again"]["ccc_mean"]
    assert len({row["runs"] for row in rows.values()}) == 3
    assert result.failures == []
    assert not (out / "failures.jsonl").exists()


def test_results_equal_scores_of_the_prediction_files(done: tuple[StudyResult, Path]) -> None:
    _, out = done
    for row in read_csv(out):
        scores = []
        for key in row["runs"].split():
            table = [
                [float(line[k]) for k in ("valence", "arousal", "label_valence", "label_arousal")]
                for path in sorted((out / "runs" / key / "predictions" / "val").glob("*.csv"))
                for line in csv.DictReader(path.open(encoding="utf-8"))
                if line["label_valence"]
            ]
            values = np.array(table)
            scores.append(ccc(values[:, :2], values[:, 2:]))
        expected = np.mean(scores, axis=0)
        assert float(row["ccc_valence"]) == pytest.approx(expected[0], abs=1e-5)
        assert float(row["ccc_arousal"]) == pytest.approx(expected[1], abs=1e-5)
        assert float(row["ccc_mean"]) == pytest.approx(expected.mean(), abs=1e-5)
        assert float(row["std_mean"]) == pytest.approx(np.std(np.mean(scores, axis=1), ddof=1), abs=1e-5)


def test_seeds_increase_and_runs_store_their_settings(done: tuple[StudyResult, Path]) -> None:
    _, out = done
    for row in read_csv(out):
        configs = [require_record(out / "runs" / key).config for key in row["runs"].split()]
        assert [config.seed for config in configs] == [0, 1]
        assert {config.fusion for config in configs} == {row["fusion"]}


def test_runs_that_were_smoothed_are_not_compared(cache: Cache, done: tuple[StudyResult, Path], tmp_path: Path) -> None:
    out = shutil.copytree(done[1], tmp_path / "out")
    run = next((out / "runs").iterdir())
    write_smoothing(run, Smoothing("mean", 2.0))
    evaluate_run(run, cache)
    message = rf"1 run of this study .*{run.name}.*vaflow smooth .* --kind none && vaflow evaluate"
    with pytest.raises(UsageError, match=message):
        run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2))
    write_smoothing(run, None)
    evaluate_run(run, cache)
    run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2))
    assert numbers(out) == numbers(done[1])


def test_finished_runs_are_reused(cache: Cache, done: tuple[StudyResult, Path], tmp_path: Path) -> None:
    _, out = done
    before, rows = stamps(out), numbers(out)
    again = run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2))
    assert (again.about.trained, again.about.reused) == (0, 6)
    assert stamps(out) == before
    assert numbers(out) == rows
    more = run_study(cache, toy_study(tmp_path), ["one"], out, Options(seeds=3))
    assert (more.about.trained, more.about.reused) == (2, 4)
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2))  # as other tests expect it


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batched_runs_give_the_same_tables(
    cache: Cache, done: tuple[StudyResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr("vaflow.train.repeats.WORTH_MEASURING", 0)  # in this process only
    monkeypatch.setattr("vaflow.train.repeats.GAIN", 1e9)
    choices: list[str] = []
    result = run_study(
        *(cache, toy_study(tmp_path), [], tmp_path / "out", Options(seeds=2)),
        processes=processes,
        together="auto" if processes == 1 else "always",
        on_choice=choices.append,
    )
    assert result.failures == []
    assert [line[:25] for line in choices] == ["2 runs train in one batch"] * (3 if processes == 1 else 0)
    rows, expected = read_csv(tmp_path / "out"), read_csv(done[1])
    assert [row["runs"] for row in rows] == [row["runs"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("ccc_valence", "ccc_arousal", "ccc_mean", "std_mean"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-4)


def test_run_hash_depends_on_the_effective_settings(cache: Cache, tmp_path: Path) -> None:
    def key(text: str = GRID, options: Options | None = None, other: Cache = cache) -> str:
        return make_schedule(other, toy_study(tmp_path, text), ["one"], options or Options(1)).entries[0].keys[0]

    first = key()
    assert key() == first
    assert key(GRID.replace("First", "Renamed")) == first
    assert key(options=Options(1, {"device": "cpu"})) == first, "the device is not part of what is trained"
    assert key(options=Options(1, {"window": "4", "frames": "8"})) == first, (
        "an explicit and a resolved window must be equal"
    )
    assert key(options=Options(1, {"lr": "0.01"})) != first
    assert key(options=Options(1, {"seed": "1"})) != first
    assert key(options=Options(1, allow_missing=True)) != first
    copy = make_cache(tmp_path / "copy")
    assert key(other=copy) == first, "the folder is not part of what is trained"
    rng = np.random.default_rng(5)
    write_labels(copy, Toy(), "train99", "train", 20.0, Curve(rng), rng)
    assert key(other=copy) != first, "another clip is other data"
    other = make_cache(tmp_path / "other", Toy(widths=(13, 10)))
    assert key(other=other) != first, "another stream"


FIRST_SETTINGS = (
    "visual audio text prompts window stride frames audio_steps label_reduction hidden temporal fusion "
    "attention_heads dropout normalize layers causal learnable_prompts prompt_context text_weights centers sigma "
    "region_labels kl_weight mse_weight ccc_weight extra_targets extra_weight modality_dropout best epochs "
    "batch_size lr weight_decay schedule warmup clip_norm seed device train_split val_split folds fold "
    "fold_splits finetune backbone_lr finetune_blocks accumulate augment checkpointing precision init"
)


def test_a_setting_added_later_keeps_the_runs_of_older_studies(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**settings: str) -> str:
        options = Options(1, {"attention_positions": "none", **settings})
        return make_schedule(cache, toy_study(tmp_path), ["one"], options).entries[0].keys[0]

    first = set(FIRST_SETTINGS.split())
    added = {field.name for field in fields(TrainConfig)} - first
    assert added == set(BEFORE_SETTING), "BEFORE_SETTING needs the value that trains as the first version did"
    unchanged = key()
    assert key(deterministic="true") != unchanged
    assert key(attention_positions="time") != unchanged
    as_dict = TrainConfig.as_dict
    monkeypatch.setattr(TrainConfig, "as_dict", lambda self: {k: v for k, v in as_dict(self).items() if k in first})
    assert key() == unchanged, "the hash of the version without these settings"


def test_an_interrupted_study_resumes(cache: Cache, done: tuple[StudyResult, Path], tmp_path: Path) -> None:
    out, ended = tmp_path / "out", []

    def stop(outcome: Outcome) -> None:
        ended.append(outcome.run.key)
        if len(ended) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2), on_run=stop)
    before = stamps(out)
    result = run_study(cache, toy_study(tmp_path), [], out, Options(seeds=2))
    assert (result.about.trained, result.about.reused) == (3, 3)
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert read_csv(out) == read_csv(done[1]), "the resumed study must equal an uninterrupted one"


def parent_and_state(process: str) -> tuple[int, str]:
    """State from /proc; "Z" for a process that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, "Z"
    return int(fields[1]), fields[0]


def children_of(process: int) -> list[int]:
    """Living direct children."""
    numbers = [path.name for path in Path("/proc").glob("[0-9]*")]
    return [int(number) for number in numbers if parent_and_state(number) in ((process, s) for s in "RSDT")]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not reached in time"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_kill_loses_only_running_trainings(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = grid_file(tmp_path, GRID.replace("epochs = 1", "epochs = 4"))
    # Forked workers: spawned ones would import torch again.
    program = "import sys, vaflow.process as p; from vaflow.cli import main; p.START_METHOD = 'fork'; sys.exit(main())"
    command = [sys.executable, "-c", program, "ablate", str(cache.path), "--out", str(out), "--grid", str(grid)]
    command += ["--seeds", "2", "--jobs", "2", "--together", "never", "-q"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(list(out.glob("runs/*/moments.json"))) >= 2 or process.poll() is not None)
        assert process.poll() is None, "the study ended before it could be killed"
        workers = children_of(process.pid)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: all(parent_and_state(str(worker))[1] == "Z" for worker in workers), 20)
    finished = [run for run in (out / "runs").iterdir() if RunFolder(run).done and (run / "moments.json").exists()]
    assert len(finished) >= 2
    assert len(finished) < 6
    before = {path: path.stat().st_mtime_ns for run in finished for path in run.rglob("*")}
    result = run_study(cache, toy_study(tmp_path, grid.read_text()), [], out, Options(seeds=2))
    assert result.about.reused == len(finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = run_study(cache, toy_study(tmp_path, grid.read_text()), [], tmp_path / "whole", Options(seeds=2))
    assert whole.about.reused == 0
    assert read_csv(out) == read_csv(tmp_path / "whole")


def test_a_missing_stream_skips_only_its_rows(cache: Cache, tmp_path: Path) -> None:
    text = GRID + '\n[[table.two.row]]\nname = "bigger"\nvisual = ["clip-vit-b32"]\naudio = ["vggish-by-hand"]\n'
    result = run_study(cache, toy_study(tmp_path, text), [], tmp_path / "out", Options(seeds=1))
    rows = {row["row"]: row for row in read_csv(tmp_path / "out")}
    assert [row["seeds"] for row in rows.values()] == ["1", "1", "1", "1", "0"]
    assert rows["bigger"]["visual"] == "clip-vit-b32"
    extract = f"vaflow extract ROOT --out {cache.path} --visual clip-vit-b32 --audio none"
    assert result.to_add.startswith(extract)
    assert "--window 4 --stride 1.5 --frames 8 --audio-steps 8" in result.to_add, (
        "the sampling of the cache must be kept"
    )
    assert f"vaflow cache import {cache.path} --stream vggish-by-hand --kind audio" in result.to_add
    assert extract in rows["bigger"]["problem"]
    (failure,) = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert (failure["item"], failure["error"]) == ("two / bigger", "MissingError")
    assert "stage" in failure
    assert extract in (tmp_path / "out" / "results.html").read_text()


def test_command_for_logmel_and_for_audio(cache: Cache) -> None:
    command = add_command(cache, [("audio", "logmel"), ("audio", "ast"), ("audio", "ast")])
    assert "--visual none --audio ast --window" in command
    assert command.count("ast") == 1
    assert "--visual none --audio none" in add_command(cache, [("audio", "logmel")])


def test_a_failed_run_does_not_stop_the_others(cache: Cache, tmp_path: Path) -> None:
    study, out = toy_study(tmp_path), tmp_path / "out"
    broken = make_schedule(cache, study, ["one"], Options(1)).entries[1].keys[0]
    (out / "runs" / broken).mkdir(parents=True)
    (out / "runs" / broken / "notes.txt").write_text("not a run")
    result = run_study(cache, study, ["one"], out, Options(1))
    assert [row.seeds for row in result.results.tables[0].rows] == [1, 0]
    (failure,) = result.failures
    assert (failure.item, failure.stage, failure.details["run"]) == ("one / gated / seed 0", "train", broken)
    assert "is not empty and is not a run directory" in failure.message
    (out / "runs" / broken / "notes.txt").unlink()
    mended = run_study(cache, study, ["one"], out, Options(1))
    assert (mended.about.trained, mended.about.reused, mended.failures) == (1, 1, [])
    assert not (out / "failures.jsonl").exists()


def holder_of(file: Path, processes: Iterable[int]) -> int:
    """The process that has a file open."""
    for process in processes:
        with suppress(OSError):
            if any(link.readlink() == file for link in Path(f"/proc/{process}/fd").iterdir()):
                return process
    raise AssertionError(f"no process has {file} open")


def test_a_killed_worker_fails_only_its_run(cache: Cache, tmp_path: Path) -> None:
    schedule = make_schedule(cache, toy_study(tmp_path), [], Options(seeds=1))
    slow = replace(schedule.runs[0], config=replace(schedule.runs[0].config, epochs=5000))
    out, outcomes = tmp_path / "out", []
    for outcome in run_all([slow, *schedule.runs[1:]], cache, out, processes=2, together="never"):
        outcomes.append(outcome)
        if len(outcomes) == 1:  # the other process is in its endless run by now
            wait_for(lambda: (out / "runs" / slow.key / "checkpoint.safetensors").exists())
            workers = [worker for server in children_of(os.getpid()) for worker in children_of(server)]
            os.kill(holder_of(out / "runs" / slow.key / ".lock", workers), signal.SIGKILL)
    failed = {outcome.run.key: outcome.ended for outcome in outcomes if outcome.ended.error}
    assert len(outcomes) == len(schedule.runs) == 3
    assert failed.keys() == {slow.key}
    assert "signal SIGKILL" in failed[slow.key].message


def test_two_studies_cannot_share_a_directory(cache: Cache, tmp_path: Path) -> None:
    study, out = toy_study(tmp_path), tmp_path / "out"
    met: list[Outcome] = []

    def meanwhile(outcome: Outcome) -> None:
        if not met:
            with pytest.raises(UsageError, match="Another `vaflow ablate`"):
                run_study(cache, study, ["one"], out, Options(1))
            met.append(outcome)

    run_study(cache, study, ["one"], out, Options(1), on_run=meanwhile)
    assert met


def test_aliases_are_applied_and_reported(cache: Cache, tmp_path: Path) -> None:
    text = GRID.replace(VISUAL, "clip-vit-b16").replace(AUDIO, "ast")
    aliases = {"clip-vit-b16": VISUAL, "ast": AUDIO}
    result = run_study(cache, toy_study(tmp_path, text), [], tmp_path / "out", Options(1, aliases=aliases))
    rows = {row["row"]: row for row in read_csv(tmp_path / "out")}
    assert rows["full"]["visual"] == VISUAL
    assert rows["full"]["stands_in"] == f"{VISUAL} for clip-vit-b16; {AUDIO} for ast"
    assert rows["eyes"]["stands_in"] == f"{VISUAL} for clip-vit-b16"
    direct = make_schedule(cache, toy_study(tmp_path), [], Options(1))
    assert {entry.row.name: entry.keys for entry in direct.entries} == {
        name: tuple(row["runs"].split()) for name, row in rows.items()
    }
    assert f"{VISUAL} for clip-vit-b16" in result.files["markdown"].read_text()
    assert f"{VISUAL} for clip-vit-b16" in result.files["html"].read_text()


@pytest.mark.parametrize("aliases", [{"toy-ayes": VISUAL}, {VISUAL: "toy-noes"}])
def test_invalid_aliases_are_rejected(cache: Cache, tmp_path: Path, aliases: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        make_schedule(cache, toy_study(tmp_path), [], Options(1, aliases=aliases))


def test_an_alias_may_omit_a_modality(cache: Cache, tmp_path: Path) -> None:
    schedule = make_schedule(cache, toy_study(tmp_path), ["two"], Options(1, aliases={AUDIO: "none"}))
    assert schedule.entries[0].config.audio == ("none",)


def test_a_cache_without_prompts_and_one_dimension(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(text=False, targets=(0,)))
    result = run_study(cache, toy_study(tmp_path), ["one"], tmp_path / "out", Options(seeds=2))
    assert not result.failures
    for row in read_csv(tmp_path / "out"):
        assert "without the prompt head" in row["note"]
        assert row["ccc_arousal"] == ""
        assert row["ccc_mean"] == row["ccc_valence"] != ""


def test_rows_on_a_subset_of_the_videos_are_marked(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folds = Options(1, {"folds": "3", "fold": "2"})
    result = run_study(cache, toy_study(tmp_path), ["one"], out, folds)
    assert not result.failures
    parts = [split_items(cache, f"fold{k}of3", ("train", "val")) for k in (1, 2, 3)]
    assert sorted(item for part in parts for item in part) == cache.items()
    assert result.results.videos == len(parts[1])
    other = make_schedule(cache, toy_study(tmp_path), ["one"], Options(1, {"folds": "3", "fold": "1"}))
    assert not {run.key for run in other.runs} & {path.name for path in (out / "runs").iterdir()}


def test_tables_are_stored_with_the_results(cache: Cache, done: tuple[StudyResult, Path]) -> None:
    result, _ = done
    assert result.files["tables"].read_text() == GRID


def test_jobs_with_the_same_data_are_adjacent(cache: Cache, tmp_path: Path) -> None:
    runs = make_schedule(cache, toy_study(tmp_path), [], Options(seeds=2)).runs
    audio = [run.config.audio for run in runs]
    assert audio == sorted(audio, key=lambda names: names == ("none",))


def test_a_study_requires_a_seed() -> None:
    with pytest.raises(UsageError, match="--seeds must be >= 1"):
        Options(seeds=0)


def test_runs_of_a_study_are_ordinary_runs(done: tuple[StudyResult, Path]) -> None:
    _, out = done
    for run in (out / "runs").iterdir():
        assert load_run(run).record.config.hidden == 8
