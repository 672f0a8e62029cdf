"""`check`, `extract` and `train` accept further containers and audio-only files."""

from pathlib import Path

import numpy as np
import pytest
from make_media import AudioTrack, VideoTrack, tones, write_media

from vaflow.cache import open_cache
from vaflow.cli import main

TIMES = tuple(range(0, 2400, 40))
CODECS = {
    "mpg": "mpeg2video",
    "m4v": "libx264",
    "wmv": "wmv2",
    "ts": "mpeg2video",
    "flv": "flv1",
    "3gp": "mpeg4",
    "mts": "libx264",
}
AUDIO = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}
SMALL = ["--window", "2", "--stride", "1", "--frames", "8", "--audio-steps", "8", "--faces", "none"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("containers")
    for suffix, codec in CODECS.items():
        write_media(root / f"{suffix}.{suffix}", VideoTrack(TIMES, codec=codec, rate=25))
    for suffix, codec in AUDIO.items():
        write_media(root / f"{suffix}.{suffix}", audio_track=AudioTrack(tones(2.4, 44100), codec=codec))
        rows = [f"{t / 10:g},{np.sin(t):.3f},{np.cos(t):.3f}" for t in range(24)]
        (root / f"{suffix}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    splits = [f"{name},{'val' if name == 'mp3' else 'train'}" for name in (*CODECS, *AUDIO)]
    (root / "splits.csv").write_text("\n".join(["name,split", *splits]) + "\n")
    (root / "notes.docx").touch()
    return root


@pytest.fixture(scope="module")
def cache(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache") / "cache"
    encoders = ["--visual", "clip-tiny", "--audio", "vggish-tiny"]
    assert main(["extract", str(root), "--out", str(cache), *encoders, *SMALL]) == 0
    return cache


def test_check_lists_the_unused_file_without_errors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(root)]) == 0
    out = capsys.readouterr().out
    assert "10 of 10 clips are usable" in out and "notes.docx" in out


@pytest.mark.slow  # test_alignment reads every container
def test_every_container_is_extracted_completely(cache: Path) -> None:
    opened = open_cache(cache)
    assert opened.items() == sorted([*CODECS, *AUDIO])
    for item in CODECS:
        assert opened.meta(item)["duration"] == pytest.approx(2.4, abs=0.1), item


def test_audio_only_clips_have_no_valid_frame(cache: Path) -> None:
    opened = open_cache(cache)
    for item in AUDIO:
        assert opened.read("vggish-tiny", item).valid.any() and opened.read("labels", item).valid.any()
        assert not opened.read("clip-tiny", item).valid.any()


def test_audio_only_clips_can_be_trained_and_predicted(root: Path, cache: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", str(cache), "--out", str(run), "--visual", "none", "--epochs", "1"]
    assert main([*command, "--set", "hidden=8", "--device", "cpu"]) == 0
    assert (run / "predictions" / "val" / "mp3.csv").is_file()
    assert main(["predict", str(run), str(root / "wav.wav"), "--out", str(out)]) == 0
    assert len((out / "wav.csv").read_text().splitlines()) > 50
    assert main(["predict", str(run), str(root), "--out", str(tmp_path / "all")]) == 0
    assert {path.stem for path in (tmp_path / "all").glob("*.csv")} == {*CODECS, *AUDIO}
