"""`--engine ray` of `vaflow ablate` and `vaflow search` on a local cluster of two nodes."""

import csv
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ablation_toys import toy_study
from synthetic_cache import Toy, make_cache
from two_nodes import two_nodes

from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.errors import UsageError
from vaflow.train.ablate.plan import Job, Options, make_plan
from vaflow.train.ablate.pool import Outcome, Pool, run_jobs
from vaflow.train.ablate.ray_workers import Member, Shared, contents
from vaflow.train.ablate.runner import documents_of

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with two_nodes(1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ray") / "cache", Toy(seconds=(6, 9)))


@pytest.fixture(scope="module")
def jobs(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Five runs; the first is much longer than the others."""
    study = toy_study(tmp_path_factory.mktemp("study"))
    short = make_plan(cache, study, [], Options(seeds=2, overrides={"device": "cpu"})).jobs
    return [replace(short[0], config=replace(short[0].config, epochs=60)), *short[1:5]]


@pytest.fixture(scope="module")
def trained_here(cache: Cache, jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, trained in this process."""
    out = tmp_path_factory.mktemp("here")
    assert not any(outcome.ended.error for outcome in run_jobs(jobs, cache, out, together="never"))
    return out


def results(out: Path) -> dict[str, bytes]:
    """Contents of the files of runs that hold no duration."""
    names = ("*.safetensors", "config.toml", "metrics.json", "predictions/*/*.csv", "moments.*")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(f"runs/*/{name}")}


@pytest.mark.parametrize("victim", ["actor", pytest.param("node", marks=pytest.mark.slow)])
def test_a_run_whose_actor_dies_continues_elsewhere_with_equal_files(
    victim: str, cluster: object, cache: Cache, jobs: list[Job], trained_here: Path, tmp_path: Path
) -> None:
    long, outcomes = tmp_path / "runs" / jobs[0].key, list[Outcome]()
    options = {"engine": "ray", "ray_address": cluster.address, "together": "never"}  # type: ignore[attr-defined]
    for outcome in run_jobs(jobs, cache, tmp_path, **options):
        outcomes.append(outcome)
        if len(outcomes) == 1:  # the other actor trains the long run
            while not (long / "checkpoint.safetensors").exists():
                time.sleep(0.02)
            if victim == "node":
                [*_, node] = cluster.worker_nodes  # type: ignore[attr-defined]
                cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
            else:
                os.kill(holder_of(long / ".lock"), signal.SIGKILL)
    assert len(outcomes) == len(jobs)
    assert [outcome.ended.message for outcome in outcomes if outcome.ended.error] == []
    assert outcomes[0].job != jobs[0] == outcomes[-1].job
    assert results(tmp_path) == results(trained_here) != {}
    assert list(tmp_path.glob(".ray-*")) == [], "the file that shows that nodes share the folder"


def holder_of(file: Path) -> int:
    """The process that has a file open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(link.readlink() == file for link in (process / "fd").iterdir()):
                return int(process.name)
    raise AssertionError(f"no process has {file} open")


def test_a_search_on_two_nodes_finds_the_same_trials(
    cluster: object, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "space.toml").write_text("epochs = 3\nhidden = 8\nlr = { low = 1e-4, high = 3e-2, log = true }\n")
    command = ["search", str(cache.path), "--space", str(tmp_path / "space.toml"), "--folds", "2", "--device", "cpu"]
    command += ["--trials", "4", "--together", "always", "-q"]
    engine = ["--engine", "ray", "--ray-address", cluster.address]  # type: ignore[attr-defined]
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    assert main([*command, "--out", str(tmp_path / "there"), *engine]) == 0
    assert (tmp_path / "there" / "best.toml").read_bytes() == (tmp_path / "here" / "best.toml").read_bytes()
    tables = []
    for name in ("here", "there"):
        with (tmp_path / name / "trials.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4


def test_an_actor_reports_choices_runs_and_refusals(cache: Cache, jobs: list[Job], tmp_path: Path) -> None:
    """An actor's code, without Ray."""
    token = tmp_path / "token"
    token.write_text("text")
    options = {"together": "never"}
    shared = Shared(str(cache.path), contents(cache), str(token), "text")
    member = Member(shared, 40, options)
    assert member.prepare() == []
    messages = member.exchange(documents_of([(jobs[1].config, tmp_path / "run")]))
    while not messages:
        messages = member.exchange([])
    assert [message["number"] for message in messages] == [0]
    assert messages[0]["ended"]["error"] == ""

    for wrong, words in (
        (Shared(str(cache.path), contents(cache), str(token), "other"), "cannot write to"),
        (Shared(str(cache.path), contents(cache), str(tmp_path / "no" / "token"), "text"), "cannot write to"),
        (Shared(str(cache.path), {}, str(token), "text"), "does not see the cache"),
        (Shared(str(tmp_path / "none"), contents(cache), str(token), "text"), "does not see the cache"),
    ):
        [message] = Member(wrong, 40, options).prepare()
        assert words in message["refused"]
        assert "Put it on a disk that all nodes mount under the same path" in message["refused"]


def test_one_gpu_cannot_be_named(cluster: object, cache: Cache, jobs: list[Job], tmp_path: Path) -> None:
    named = replace(jobs[1], config=replace(jobs[1].config, device="cuda:1"))
    with pytest.raises(UsageError, match="remove the number"):
        list(run_jobs([named], cache, tmp_path, engine="ray", ray_address=cluster.address))  # type: ignore[attr-defined]


def test_an_in_memory_cache_is_rejected(tmp_path: Path) -> None:
    memory = make_cache("memory://ray-training", Toy(seconds=(6, 9)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one process"):
        Pool(memory, tmp_path, engine="ray")


@pytest.mark.parametrize("command", ["ablate", "search"])
@pytest.mark.parametrize(
    ("arguments", "word"), [(["--engine", "spark"], "local, ray"), (["--ray-address", "auto"], "--engine ray")]
)
def test_contradictory_options_are_rejected(
    command: str, arguments: list[str], word: str, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = ["--space", str(tmp_path / "space.toml")] if command == "search" else []
    assert main([command, str(cache.path), "--out", str(tmp_path / "out"), *space, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_missing_ray_is_named_with_the_remedy(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["ablate", str(cache.path), "--out", str(tmp_path / "out"), "--table", "1", "--engine", "ray"]
    assert main([*command, "--alias", "clip-vit-b16=toy-eyes", "--alias", "ast=toy-ears"]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err
