"""Several encoders on one clip: VGGish equals separate examples, shared audio, streams added later."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_media import AudioTrack, VideoTrack, tones, write_media

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.encoders import build_encoder
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.encoders.vggish import VGGISH_MEL
from vaflow.extract import loop
from vaflow.extract.audio import decode_audio
from vaflow.extract.config import ExtractConfig
from vaflow.extract.decoding_pool import Job
from vaflow.extract.pipeline import extract_with
from vaflow.extract.plan import Summary

WINDOW, STRIDE, STEPS, STEP = 2.0, 1.0, 4, 0.5


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip with audio, one whose audio ends after 1.3 s, one without audio."""
    folder = tmp_path_factory.mktemp("several")
    video_track = VideoTrack(tuple(range(0, 3600, 200)), options={"preset": "ultrafast"})
    write_media(folder / "whole.mp4", video_track, AudioTrack(tones(3.6, 16000), 16000))
    write_media(folder / "part.mp4", video_track, AudioTrack(tones(1.3, 16000), 16000))
    write_media(folder / "mute.mp4", video_track)
    return folder


@pytest.fixture(scope="module")
def encoders() -> tuple[list[VisualEncoder], list[AudioEncoder]]:
    torch.set_num_threads(1)
    visual, audio = [build_encoder("resnet-tiny")], [build_encoder("ast-tiny"), build_encoder("vggish-tiny")]
    return visual, audio  # type: ignore[return-value]


def run(folder: Path, out: Path, visual: list[VisualEncoder], audio: list[AudioEncoder]) -> tuple[Cache, Summary]:
    names = (tuple(e.name for e in visual), tuple(e.name for e in audio))
    config = ExtractConfig(
        *names, window=WINDOW, stride=STRIDE, frames=STEPS, audio_steps=STEPS, dtype="float32", face_source="none",
        device="cpu", workers=1,
    )  # fmt: skip
    dataset: Dataset = open_dataset(folder, "videos")
    summary = extract_with(dataset, out, config, visual, audio, torch.device("cpu"))
    assert not summary.failures
    return open_cache(out), summary


@pytest.fixture(scope="module")
def whole(
    clips_folder: Path, encoders: tuple[list[VisualEncoder], list[AudioEncoder]], tmp_path_factory
) -> tuple[Cache, Summary]:
    return run(clips_folder, tmp_path_factory.mktemp("whole") / "cache", *encoders)


def test_every_step_stores_the_example_centred_on_it(
    whole: tuple[Cache, Summary], clips_folder: Path, encoders: tuple[list[VisualEncoder], list[AudioEncoder]]
) -> None:
    cache, vggish = whole[0], encoders[1][1]
    for item in ("whole", "part"):
        stored, duration = cache.read("vggish-tiny", item), cache.meta(item)["duration"]
        samples = np.concatenate(list(decode_audio(clips_folder / f"{item}.mp4", start=0.0, duration=duration)))
        mel = VGGISH_MEL.open().push(samples)
        centres = 0.01 * np.arange(-200, 600) + (95 * 160 + 400) / 2 / 16000  # of the example that begins at frame n
        padded = np.full((1000, 64), np.log(np.float32(0.01)))
        padded[200 : 200 + len(mel)] = mel
        for w, k in np.argwhere(stored.valid):
            time = stored.start[w] + (k + 0.5) * STEP
            assert stored.time[w, k] == pytest.approx(time, abs=1e-12)
            first = int(np.argmin(np.abs(centres - time)))
            example = torch.from_numpy(padded[first : first + 96].astype(np.float32))
            alone = vggish.encode(example[None], window=WINDOW, steps=STEPS)[0, 0].numpy()
            np.testing.assert_allclose(stored.embedding[w, k], alone, atol=1e-3 * np.abs(alone).max())
        assert (stored.embedding[~stored.valid] == 0).all()


def test_a_step_is_valid_if_audio_covers_half_of_its_part_in_the_clip(whole: tuple[Cache, Summary]) -> None:
    cache = whole[0]
    for item, end in (("whole", 3.6), ("part", 1.3), ("mute", 0.0)):
        vggish = cache.read("vggish-tiny", item)
        np.testing.assert_array_equal(vggish.valid, cache.read("ast-tiny", item).valid)
        first = vggish.start[:, None] + np.arange(STEPS) * STEP
        last = np.minimum(first + STEP, cache.meta(item)["duration"])
        middle = (first + last) / 2
        clear = np.abs(middle - end) > 0.1  # codecs append some audio at the end
        clear |= first >= cache.meta(item)["duration"]
        expected = (middle < end) & (first < last)
        assert (vggish.valid == expected)[clear].all()


def test_examples_shared_by_windows_are_encoded_once(whole: tuple[Cache, Summary]) -> None:
    cache, summary = whole
    steps, examples = 0, 0
    for item in cache.items():
        vggish = cache.read("vggish-tiny", item)
        steps += int(vggish.valid.sum())
        examples += len(np.unique(vggish.time[vggish.valid].round(6)))
        for time in np.unique(vggish.time[vggish.valid]):
            same = vggish.embedding[vggish.valid & (vggish.time == time)]
            assert (same == same[0]).all()
    assert summary.encoded["vggish-tiny"] == examples < steps


def test_streams_added_later_are_identical_and_keep_the_others(
    whole: tuple[Cache, Summary],
    clips_folder: Path,
    encoders: tuple[list[VisualEncoder], list[AudioEncoder]],
    tmp_path: Path,
) -> None:
    visual, (ast, vggish) = encoders
    first, _ = run(clips_folder, tmp_path / "cache", [], [ast])
    attempts = {(s, i): first.record(s, i).attempt for s in ("ast-tiny", "logmel", "labels") for i in first.items()}
    cache, summary = run(clips_folder, tmp_path / "cache", visual, [ast, vggish])
    assert summary.encoded["ast-tiny"] == 0
    assert {key: cache.record(*key).attempt for key in attempts} == attempts
    for stream in ("resnet-tiny", "vggish-tiny", "ast-tiny", "logmel"):
        for item in cache.items():
            one, other = cache.read(stream, item).arrays, whole[0].read(stream, item).arrays
            assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}


def test_ast_added_to_a_vggish_cache_computes_log_mel(
    whole: tuple[Cache, Summary],
    clips_folder: Path,
    encoders: tuple[list[VisualEncoder], list[AudioEncoder]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, (ast, vggish) = encoders
    run(clips_folder, tmp_path / "cache", [], [vggish])
    calls: list[bool] = []
    original = loop.Job

    def noted(**job: Any) -> Job:
        calls.append(job["audio"])
        return original(**job)

    monkeypatch.setattr(loop, "Job", noted)
    cache, _ = run(clips_folder, tmp_path / "cache", [], [ast, vggish])
    assert calls == [False] * 3
    for item in cache.items():
        one, other = cache.read("ast-tiny", item), whole[0].read("ast-tiny", item)
        assert one.embedding.tobytes() == other.embedding.tobytes()


def test_stream_identities_state_their_input(whole: tuple[Cache, Summary]) -> None:
    streams = whole[0].streams()
    assert streams["ast-tiny"].identity["sound"] == "logmel float32"
    assert streams["vggish-tiny"].identity["sound"] == "vggish log-mel float32"
    assert streams["resnet-tiny"].identity["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
