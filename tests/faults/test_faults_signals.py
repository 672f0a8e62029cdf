"""SIGINT and SIGTERM at every stage: exit code, clear message, no remaining process, no wrong commit."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kills import SMALL, assert_same_run
from lab import EXTRACT, TWO_WORKERS, Lab, assert_printed, assert_same_cache, children_of, until

from vaflow.cache import open_cache
from vaflow.cache.maintenance import verify

HOW = {  # name -> signal, receiver, exit code, message
    "ctrl-c": ("signal_group", signal.SIGINT, 130, "interrupted"),
    "scheduler": ("signal_self", signal.SIGTERM, 143, "terminated"),
    "shutdown": ("signal_group", signal.SIGTERM, 143, "terminated"),
}
EXTRACTING = {  # stage -> function and the index of its call
    "scanning": ("vaflow.datasets.open_dataset", 1),
    "planning": ("vaflow.extract.plan.make_plan", 1),
    "decoding": ("vaflow.extract.clip_assembly.ClipAssembly.take", 2),
    "encoding images": ("vaflow.encoders.clip.ClipEncoder.encode", 2),
    "encoding audio": ("vaflow.encoders.vggish.VggishEncoder.encode", 1),
    "writing": ("vaflow.cache.cache.Cache.write", 3),
    "between arrays and record": ("vaflow.cache.layout.Layout.create", 2),
    "ending": ("vaflow.cache.cache.Cache.refresh_index", 1),
}
TRAINING = {
    "loading": ("vaflow.train.data.load_split", 2),
    "training": ("vaflow.train.training_loop.train_step", 5),
    "writing the checkpoint": ("vaflow.train.training_loop.write_tensors", 2),
    "evaluating": ("vaflow.train.training_loop.predict_clips", 2),
    "scoring at the end": ("vaflow.train.session.evaluate_windows", 1),
    "writing predictions": ("vaflow.train.session.write_evaluation", 1),
    "writing the metrics": ("vaflow.train.run_folder.RunFolder.write_metrics", 1),
}


def strike_with(how: str, stage: tuple[str, int]) -> str:
    who, number, _, _ = HOW[how]
    return f"from strikes import *; strike({stage[0]!r}, {stage[1]}, {who}, {int(number)})"


def struck(lab: Lab, args: Sequence[object], how: str, stage: tuple[str, int], name: str) -> None:
    """Run, inject the fault, and check the result."""
    process = lab.start(args, strike_with(how, stage))
    ended = process.wait()
    assert ended.code == HOW[how][2], f"struck while {name}: exit code {ended.code}\n{ended.err[-3000:]}"
    assert_printed(ended, HOW[how][2], HOW[how][3], "the same command again")
    assert process.orphans(2.0) == [], f"struck while {name}"


def in_turn(stages: dict[str, tuple[str, int]], turn: int) -> Iterator[tuple[str, tuple[str, int], str]]:
    """Stage, its function, and one of the signals; another one for every `turn`."""
    for number, (name, stage) in enumerate(stages.items()):
        yield name, stage, list(HOW)[(number + turn) % len(HOW)]


TURNS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("turn", TURNS)
def test_extraction_handles_signals_at_every_stage(
    lab: Lab, media: Path, whole: Path, tmp_path: Path, turn: int
) -> None:
    """Each command resumes the one before; `clip0` is dropped, so that something is left to write."""
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    for name, stage, how in in_turn(EXTRACTING, turn):
        struck(lab, args, how, stage, name)
        if (out / "manifest.json").exists():
            cache = open_cache(out, writable=True)
            assert verify(cache) == [], f"struck while {name}"
            assert not (out / "failures.jsonl").exists(), f"struck while {name}: no clip failed"
            for stream in cache.streams():
                if cache.has(stream, "clip0"):
                    cache.drop(stream, "clip0")
    assert_printed(lab.run(args), 0)
    assert_same_cache(out, whole)


@pytest.mark.parametrize("turn", TURNS)
def test_training_handles_signals_at_every_stage(
    lab: Lab, toys: Path, whole_run: Path, tmp_path: Path, turn: int
) -> None:
    out = tmp_path / "run"
    args = ["train", toys, "--out", out, *SMALL]
    for name, stage, how in in_turn(TRAINING, turn):
        struck(lab, args, how, stage, name)
    assert_printed(lab.run(args), 0)
    assert_same_run(out, whole_run)


@pytest.mark.parametrize("how", ["ctrl-c", "scheduler"])
def test_conversion_handles_signals_while_copying(lab: Lab, toys: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "cache"
    args = ["cache", "convert", toys, "--out", out, "--store", "hdf5"]
    for stage in (("vaflow.cache.copy.survey", 1), ("vaflow.cache.cache.Cache.adopt", 6)):
        struck(lab, args, how, stage, stage[0])
    assert verify(open_cache(out)) == []
    assert_printed(lab.run(args), 0)
    assert_same_cache(out, toys)


def test_a_killed_command_leaves_no_worker(lab: Lab, media: Path, tmp_path: Path) -> None:
    """The parent alone is killed, as by the OOM killer: its decoders exit by themselves."""
    process = lab.start(
        ["extract", media, "--out", tmp_path / "cache", *TWO_WORKERS],
        f"from strikes import *; strike({EXTRACTING['decoding'][0]!r}, 2, signal_self, {int(signal.SIGKILL)})",
    )
    assert process.wait().code == -signal.SIGKILL
    assert process.orphans() == []


def test_a_second_ctrl_c_corrupts_nothing(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    """A second Ctrl-C arrives during cleanup."""
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *TWO_WORKERS]
    process = lab.start(args)
    until(process, lambda: len(list(out.glob("records/labels/*.json"))) > 0)
    process.send(signal.SIGINT, group=True)
    process.send(signal.SIGINT, group=True)
    process.wait()
    assert process.orphans() == []
    assert verify(open_cache(out)) == []
    assert_printed(lab.run(args), 0)
    assert_same_cache(out, whole)


@pytest.mark.parametrize("how", ["ctrl-c", "shutdown"])
def test_a_study_handles_signals_while_processes_start(lab: Lab, toys: Path, tmp_path: Path, how: str) -> None:
    """Worker processes import for seconds; neither they nor their messages remain."""
    args = ["ablate", toys, "--table", "extra", "--seeds", "1", "--jobs", "2", "--out", tmp_path / "study"]
    names = ["--alias", "clip-vit-b16=toy-eyes", "--alias", "ast=toy-ears", "--set", "device=cpu"]
    process = lab.start([*args, *names])
    until(process, lambda: len(children_of(process.pid)) >= 2)
    process.send(HOW[how][1], group=True)
    assert_printed(process.wait(), HOW[how][2], HOW[how][3])
    assert process.orphans(5.0) == []
