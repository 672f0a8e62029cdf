"""A hanging decoder fails its clip; a slow or waiting one does not."""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.datasets import Clip
from vaflow.errors import MediaError, UsageError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.decoding_pool import (
    QUEUED_MESSAGES,
    AudioBlock,
    Call,
    Done,
    Failed,
    Send,
    Work,
    WorkerPool,
    call,
    each,
    serve,
)
from vaflow.process import BEAT_SECONDS, ChildProcess, beat, listening

TIMEOUT = 3.0


def _hang_at_two(number: int) -> int:
    if number == 2:
        time.sleep(3600)
    return number * number


def _beat_for_long(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        beat()
        time.sleep(0.05)
    return "done"


def _talk(task: Call, send: Send, _: object) -> None:
    """More data than the pipe and the queue hold."""
    for _ in range(4 * QUEUED_MESSAGES):
        send(AudioBlock(task.number, np.zeros(20_000, np.float32)))
    send(Done(task.number))


def test_a_stalled_worker_fails_one_item_and_is_killed() -> None:
    results = dict(each(_hang_at_two, range(5), workers=2, item_timeout=TIMEOUT))
    failed = results.pop(2)
    assert results == {number: number * number for number in (0, 1, 3, 4)}
    assert isinstance(failed, Failed)
    assert failed.error == "WorkerHung"
    assert "no message for 3 s" in failed.message
    assert "--item-timeout" in failed.message
    assert not multiprocessing.active_children()


def test_slow_work_with_heartbeats_is_not_a_hang() -> None:
    assert dict(each(_beat_for_long, [2.5 * TIMEOUT], item_timeout=TIMEOUT)) == {0: "done"}


def test_a_worker_waiting_for_the_parent_is_not_a_hang() -> None:
    """The queue is full and the worker blocks in `send` for longer than the limit."""
    with WorkerPool([Call(0, len, ())], 1, _talk, item_timeout=TIMEOUT) as pool:
        messages = iter(pool)
        next(messages)
        time.sleep(2.5 * TIMEOUT)
        rest = list(messages)
    assert isinstance(rest[-1], Done)
    assert len(rest) == 4 * QUEUED_MESSAGES


def test_without_a_time_limit_no_item_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaflow.extract.decoding_pool.STARTING", 0.0)
    assert dict(each(_beat_for_long, [1.0], item_timeout=0)) == {0: "done"}


def test_an_error_fails_its_item_only() -> None:
    (failed,) = dict(each(_refuse, [0])).values()
    assert isinstance(failed, Failed)
    assert (failed.error, failed.message) == ("MediaError", "no")


def _refuse(_: int) -> None:
    raise MediaError("no")


def test_a_worker_killed_before_it_receives_its_item_fails_that_item_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ChildProcess] = []

    class FirstIsKilled(ChildProcess):
        def __init__(self, target: Callable[..., None], arguments: Sequence[Any] = (), *, name: str) -> None:
            super().__init__(target, arguments, name=name)
            started.append(self)
            if len(started) == 1:
                self.kill()

    monkeypatch.setattr("vaflow.extract.decoding_pool.ChildProcess", FirstIsKilled)
    results = dict(each(_square, range(3)))
    failed = results.pop(0)
    assert isinstance(failed, Failed)
    assert failed.error == "WorkerDied"
    assert "SIGKILL" in failed.message
    assert results == {1: 1, 2: 4}


def _square(number: int) -> int:
    return number * number


def test_heartbeats_are_forwarded_at_most_once_a_second() -> None:
    beats: list[float] = []
    with listening(lambda: beats.append(time.monotonic())):
        _beat_for_long(2.5 * BEAT_SECONDS)
    assert 1 <= len(beats) <= 2
    beat()  # the receiver is closed
    assert len(beats) <= 2


def test_call_ends_with_done() -> None:
    sent: list[Any] = []
    call(Call(7, len, "abc"), sent.append)
    assert sent[0].result == 3
    assert isinstance(sent[1], Done)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_the_time_limit_must_be_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(UsageError, match="item-timeout"):
        ExtractConfig(item_timeout=seconds)


def _serve_and_hang(pipe: Any, run_job: Work) -> None:
    def stuck(job: Any, send: Send, ask: Any = None) -> None:
        if job.clip.id == "stuck":
            time.sleep(3600)
        run_job(job, send, ask)

    serve(pipe, stuck)


def test_the_command_lists_a_hung_clip_and_exits_with_3(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("stuck.mp4", "fine.mp4"):
        (data / name).symlink_to((clips / "obama.mp4").resolve())
    monkeypatch.setattr("vaflow.extract.decoding_pool.serve", _serve_and_hang)
    cache = tmp_path / "cache"
    options = ["--visual", "none", "--audio", "none", "--item-timeout", str(TIMEOUT), "--workers", "2"]
    assert main(["extract", str(data), "--out", str(cache), *options]) == 3
    assert open_cache(cache).items() == ["fine"]
    (line,) = [json.loads(text) for text in (cache / "failures.jsonl").read_text().splitlines()]
    assert (line["item"], line["stage"], line["error"]) == ("stuck", "worker", "WorkerHung")
    assert "failures.jsonl" in capsys.readouterr().err.splitlines()[-1]


def test_check_decodes_suspect_clips_in_a_child_process(tmp_path: Path) -> None:
    """The decoding process has a memory limit; the parent has none."""
    ((_, limit),) = each(_memory_limit, [None])
    assert limit == 4 * 2**30
    import resource

    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def _memory_limit(_: None) -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def test_clips_can_be_sent_to_a_process(tmp_path: Path) -> None:
    clip = Clip("a", None, "a", tmp_path / "a.mp4", tmp_path / "a.mp4")
    assert dict(each(_itself, [clip])) == {0: clip}


def _itself(clip: Clip) -> Clip:
    return clip
