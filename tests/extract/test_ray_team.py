"""The driver of `--engine ray` on a fake Ray whose actors die on command.

What is under way when an actor dies is tried again by itself; what kills its actor every time is listed; the rest is
extracted once. Real Ray: test_ray_cluster.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lab import Lab, assert_printed

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.schema import FACES, StreamInfo
from vaflow.cli import main
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.errors import UsageError, VaflowError
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.faces.people import no_faces
from vaflow.extract.plan import Extracted, PendingClip, Summary, carry_out
from vaflow.extract.ray_engine import ATTEMPTS, Prepared, Report, Team, places
from vaflow.process import QUIET

LABELS = StreamInfo("labels", "labels", 0, "float32", {"encoder": "toy"})
CONFIG = ExtractConfig(visual=(), audio=(), device="cpu", workers=1)


class DiedError(Exception):
    """The error of the fake Ray for a dead actor."""


class ToyMember:
    """Commit one waiting task per call; `deadly` items kill the actor before, `late` items after the commit."""

    def __init__(self, cache: Cache, ray: "ToyRay") -> None:
        self.cache, self.ray, self.tasks, self.closed = cache, ray, [], False  # type: ignore[var-annotated]

    def prepare(self) -> Prepared:
        if self.ray.stillborn:
            raise DiedError("no memory")
        return Prepared({"labels": LABELS})

    def exchange(self, tasks: Sequence[PendingClip], last: bool) -> Report:
        self.ray.assigned.append([task.clip.id for task in tasks])
        self.tasks += tasks
        self.closed |= last
        outcomes = []
        if self.tasks:
            item = self.tasks[0].clip.id
            if item in self.ray.deadly:
                raise DiedError("killed by the operating system")
            self._commit(item)
            if item in self.ray.late:
                self.ray.late.remove(item)
                raise DiedError("a moment later")
            outcomes.append(Extracted(self.tasks.pop(0).clip.id, 2.0, people=2 if item < "clip04" else 1))
        ended = self.closed and not self.tasks
        self.closed &= not ended
        return Report(tuple(outcomes), max(0, len(self.tasks) - 1), ended, {"toy": 1}, {"s": 1.0}, (), None)

    def _commit(self, item: str) -> None:
        self.ray.committed.append(item)
        arrays = {"time": np.arange(3.0), "value": np.zeros((3, 2), np.float32), "valid": np.ones((3, 2), bool)}
        source = {"split": None, "group": item}
        self.cache.write("labels", item, arrays, meta={"duration": 2.0}, source=source)


class ToyRay:
    """The part of the Ray API that the driver uses; calls run when they are awaited."""

    exceptions = SimpleNamespace(RayError=DiedError, RayTaskError=type("RayTaskError", (Exception,), {}))

    def __init__(self, cache: Cache, cpus: int = 4) -> None:
        self.cache, self.cpus, self.hired = cache, cpus, 0
        self.deadly: set[str] = set()
        self.late: set[str] = set()
        self.stillborn = False
        self.assigned: list[list[str]] = []
        self.committed: list[str] = []
        self.killed: list[object] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 99}}]

    def remote(self, _: type) -> "ToyRay":
        return self

    def options(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(remote=self._hire)

    def _hire(self, *_: object) -> SimpleNamespace:
        self.hired += 1
        member = ToyMember(self.cache, self)
        calls = {
            name: SimpleNamespace(remote=lambda *assigned, method=method: partial(method, *assigned))
            for name, method in (("prepare", member.prepare), ("exchange", member.exchange))
        }
        return SimpleNamespace(**calls)

    def wait(self, calls: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> object:
        return call()

    def kill(self, handle: object) -> None:
        self.killed.append(handle)


@pytest.fixture
def toy(tmp_path: Path) -> ToyRay:
    cache = create_cache(tmp_path / "cache")
    cache.declare(LABELS)
    return ToyRay(cache)


def run(ray: ToyRay, items: int = 10) -> Summary:
    clips = tuple(Clip(f"clip{k:02d}", None, f"clip{k:02d}", None) for k in range(items))
    dataset = Dataset(Path(), "toy", clips)
    with Team(ray, ray.cache, CONFIG, items) as team:
        return carry_out(ray.cache, team.infos(), dataset, Shard(), team.work)


def test_every_item_is_assigned_once_to_free_members(toy: ToyRay) -> None:
    summary = run(toy)
    assert (summary.extracted, summary.media_seconds) == (10, 20.0)
    assert sorted(toy.committed) == open_cache(toy.cache.path).items()
    assert toy.hired == 2, "four CPUs, two for each"
    assert max(map(len, toy.assigned)) == 2, "one to begin with and one to wait"
    assert len(toy.killed) == 2, "leaving the pool must end its actors"
    assert run(toy).done == 10


def test_clips_with_several_people_are_counted_after_a_member_death(toy: ToyRay) -> None:
    toy.cache.declare(StreamInfo(FACES, "faces", 0, "float32", {"encoder": FACES}))
    toy.cache.write(FACES, "clip01", dict(no_faces()), meta={"notable": 3})
    toy.late = {"clip01"}
    assert run(toy).several_people == 4


def test_an_item_that_always_crashes_is_listed_and_the_others_finish(toy: ToyRay) -> None:
    toy.deadly = {"clip03"}
    summary = run(toy)
    assert summary.extracted == 9
    [failure] = summary.failures
    assert (failure.item, failure.stage, failure.error) == ("clip03", "worker", "ActorDied")
    assert f"{ATTEMPTS} times (killed by the operating system)" in failure.message
    assert toy.assigned.count(["clip03"]) == ATTEMPTS - 1, "an item that killed an actor must be retried alone"
    assert sorted(toy.committed) == sorted(set(toy.committed)), "an item was processed twice"
    assert Path(summary.failures_file).read_text().count("\n") == 1


def test_many_crashing_items_do_not_hang_the_run(toy: ToyRay) -> None:
    toy.deadly = {f"clip{k:02d}" for k in range(0, 10, 2)}
    summary = run(toy)
    assert summary.extracted == 5
    assert {failure.item for failure in summary.failures} == toy.deadly


def test_items_committed_before_a_crash_are_not_repeated(toy: ToyRay) -> None:
    toy.late = {"clip01"}
    summary = run(toy)
    assert (summary.extracted, summary.failures) == (10, [])
    assert toy.committed.count("clip01") == 1


def test_members_that_die_at_startup_end_the_run(toy: ToyRay) -> None:
    toy.stillborn = True
    with pytest.raises(VaflowError, match=r"before they were ready.*no memory"):
        run(toy)


def test_a_cache_error_ends_the_run(toy: ToyRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ToyMember, tasks: Sequence[PendingClip], last: bool) -> Report:
        return Report((), 0, True, {}, {}, (), OSError(28, "No space left on device"))

    monkeypatch.setattr(ToyMember, "exchange", full)
    with pytest.raises(OSError, match="No space left"):
        run(toy)
    assert len(toy.killed) == toy.hired


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([{"CPU": 2}], "auto", 0, (1, 0, 2, 1)),
        ([{"CPU": 16}, {"CPU": 6}, {}], "auto", 0, (5, 0, 4, 2)),
        ([{"CPU": 16}], "cpu", 7, (2, 0, 8, 7)),
        ([{"CPU": 96, "GPU": 8}, {"CPU": 16, "GPU": 1}, {"CPU": 64}], "auto", 0, (9, 1, 12, 11)),
        ([{"CPU": 96, "GPU": 8}], "cuda", 5, (8, 1, 12, 5)),
        ([{"CPU": 8, "GPU": 1}], "cpu", 0, (2, 0, 4, 2)),
    ],
)
def test_one_member_is_started_per_gpu_or_cpu_group(
    nodes: list[dict[str, float]], device: str, workers: int, expected: tuple[int, ...]
) -> None:
    members = places(nodes, ExtractConfig(device=device, workers=workers))
    assert (members.count, members.gpus, members.cpus, members.workers) == expected


def test_a_cluster_without_enough_resources_is_an_error() -> None:
    with pytest.raises(VaflowError, match="GPU"):
        places([{"CPU": 8}], ExtractConfig(device="cuda"))
    with pytest.raises(VaflowError, match="CPU"):
        places([{"CPU": 0}], ExtractConfig(device="cpu"))


def test_a_missing_ray_install_states_the_remedy(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("a video")
    ended = lab.run(
        ["extract", tmp_path, "--out", tmp_path / "c", "--engine", "ray"], "import sys; sys.modules['ray'] = None"
    )
    assert_printed(ended, 2, "pip install -e '.[ray]'")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--engine", "spark"], "local, ray"),
        (["--ray-address", "auto"], "--engine ray"),
        (["--engine", "ray", "--device", "cuda:1"], "remove the number"),
    ],
)
def test_contradictory_options_are_rejected(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_text("a video")
    assert main(["extract", str(tmp_path), "--out", str(tmp_path / "c"), *arguments]) == 2
    assert word in capsys.readouterr().err


def test_an_in_memory_cache_is_rejected() -> None:
    from vaflow.extract.ray_engine import extract_on_ray

    with pytest.raises(UsageError, match="one process"):
        extract_on_ray(Dataset(Path(), "toy", ()), Path("memory://a/b"), CONFIG)


def test_user_environment_variables_override_the_ray_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    import os

    from vaflow.process import import_ray

    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    import_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert os.environ["RAY_SCHEDULER_EVENTS"] == "0"
