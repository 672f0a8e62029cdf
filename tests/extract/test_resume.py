"""After a kill or a worker death, committed items stay and the next run extracts the rest."""

import json
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_extraction import CONFIG, run

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.decoding_pool import Ask, Done, Failed, Job, Send, Work, WorkerPool, serve
from vaflow.extract.worker import run_job


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Twelve short clips of two contents."""
    root = tmp_path_factory.mktemp("many")
    for k in range(12):
        (root / f"clip{k:02d}.mp4").write_bytes((clips / ("single_face.mp4", "carphone.mp4")[k % 2]).read_bytes())
    return root


def test_a_worker_death_fails_one_clip(
    many: Path, tiny_pair: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker reading clip05 is killed by the operating system; the others are extracted."""
    monkeypatch.setattr("vaflow.extract.decoding_pool.serve", _serve_and_die_at_clip05)
    summary = run(open_dataset(many, "videos"), tmp_path / "cache", tiny_pair)
    assert [failure.item for failure in summary.failures] == ["clip05"]
    assert "SIGKILL" in summary.failures[0].message
    assert summary.extracted == 11
    listed = [json.loads(line) for line in Path(summary.failures_file).read_text().splitlines()]
    assert listed[0]["item"] == "clip05"
    assert listed[0]["stage"] == "worker"

    monkeypatch.undo()
    assert run(open_dataset(many, "videos"), tmp_path / "cache", tiny_pair).extracted == 1


def _serve_and_die_at_clip05(pipe: Connection, run_job: Work) -> None:
    """At module level, so that a spawned process can import it."""

    def deadly(job: Job, send: Send, ask: Ask) -> None:
        if job.clip.id == "clip05":
            os.kill(os.getpid(), signal.SIGKILL)
        run_job(job, send, ask)

    serve(pipe, deadly)


def test_leaving_the_pool_early_stops_its_processes(many: Path) -> None:
    import multiprocessing

    clips = open_dataset(many, "videos").clips
    jobs = [Job(n, clip, CONFIG.grid, True, True, "auto", (), False) for n, clip in enumerate(clips)]
    with WorkerPool(jobs, 2, run_job) as pool:
        for message in pool:
            assert not isinstance(message, Failed)
            if isinstance(message, Done):
                break
    assert not multiprocessing.active_children()


def test_nan_features_fail_only_their_clip(many: Path, tiny_pair: tuple, tmp_path: Path) -> None:
    visual, audio = tiny_pair

    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(visual, name)

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), visual.dim), np.nan)

    summary = run(open_dataset(many, "videos"), tmp_path / "cache", (Broken(), audio))
    assert summary.extracted == 0
    assert {failure.stage for failure in summary.failures} == {"commit"}
    assert all("NaN" in failure.message for failure in summary.failures)
    assert open_cache(tmp_path / "cache").items() == []
