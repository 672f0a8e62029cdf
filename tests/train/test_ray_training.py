"""`--engine ray` of `vaflow ablate` and `vaflow search` without a cluster; with one: test_ray_cluster.py."""

import sys
from pathlib import Path

import pytest
from ablation_toys import toy_study
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.errors import UsageError
from vaflow.train.ablate.pool import Member, Pool, Shared, contents
from vaflow.train.ablate.tables import Options, ScheduledRun, make_schedule
from vaflow.train.ablate.workers import documents_of

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ray") / "cache", Toy(seconds=(6, 9)))


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> ScheduledRun:
    study = toy_study(tmp_path_factory.mktemp("study"))
    return make_schedule(cache, study, [], Options(overrides={"device": "cpu"})).runs[0]


def test_an_actor_reports_choices_runs_and_refusals(cache: Cache, run: ScheduledRun, tmp_path: Path) -> None:
    """An actor's code, without Ray."""
    token = tmp_path / "token"
    token.write_text("text")
    options = {"together": "never"}
    shared = Shared(str(cache.path), contents(cache), str(token), "text")
    member = Member(shared, 40, options)
    assert member.prepare() == []
    messages = member.exchange(documents_of([(run.config, tmp_path / "run")]))
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
