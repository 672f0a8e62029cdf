"""The last audio step of a clip is judged by its part within the clip."""

from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import write_video
from tiny_extraction import run

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.extract import plan, streams, video
from vaflow.extract.audio import ends_in_a_short_step, step_valid
from vaflow.extract.config import ExtractConfig
from vaflow.timeline import Grid

ALONE = ExtractConfig(visual=(), audio=("ast-tiny",), device="cpu", workers=1, face_source="none")


@pytest.mark.parametrize(
    ("audio_ends", "clip_ends", "steps"),
    [(8.71, 8.71, 18), (8.71, 10.0, 17), (8.80, 10.0, 18), (8.62, 8.71, 18), (8.55, 8.71, 17), (8.5, 8.71, 17)],
)
def test_a_step_is_valid_if_half_of_its_part_within_the_clip_has_audio(
    audio_ends: float, clip_ends: float, steps: int
) -> None:
    frames = round(audio_ends * 100) - 2  # a frame covers 25 ms
    (valid,) = step_valid(np.ones(frames, bool), np.zeros(1), 10.0, 20, clip_ends)
    assert valid.tolist() == [True] * steps + [False] * (20 - steps)


def test_only_clips_with_a_short_last_step_are_outdated() -> None:
    assert ends_in_a_short_step(Grid(), 20, 8.71)
    assert not ends_in_a_short_step(Grid(), 20, 8.8)
    assert not ends_in_a_short_step(Grid(), 20, 9.0)
    assert not ends_in_a_short_step(Grid(), 20, 0.0)


def test_audio_of_affected_clips_is_extracted_again_into_an_older_cache(
    tmp_path: Path, tiny_pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "data", tmp_path / "cache"
    for name, frames in (("short_step", 44), ("long_step", 48)):  # 2.2 s and 2.4 s; a step is 0.5 s
        write_video(root / f"{name}.mp4", np.arange(frames) / 20, frames / 20)
    with monkeypatch.context() as earlier:
        for module in (video, streams, plan):
            earlier.setattr(module, "READING", 2)
        assert run(open_dataset(root, "videos"), out, (None, tiny_pair[1]), ALONE).extracted == 2
    before = open_cache(out).fingerprint("ast-tiny")

    summary = run(open_dataset(root, "videos"), out, (None, tiny_pair[1]), ALONE)
    assert (summary.extracted, summary.changed, summary.done) == (1, 1, 1)
    cache = open_cache(out)
    assert cache.fingerprint("ast-tiny") == before
    assert {item: cache.read("ast-tiny", item).valid.sum() for item in cache.items()} == {
        "short_step": 5,
        "long_step": 5,
    }
    assert run(open_dataset(root, "videos"), out, (None, tiny_pair[1]), ALONE).done == 2
