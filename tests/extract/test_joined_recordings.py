"""Byte-wise concatenated recordings, whose timestamps restart in the middle."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from make_media import AudioTrack, VideoTrack, tones, write_media

from vaflow.errors import MediaError
from vaflow.extract.audio import decode_audio
from vaflow.extract.container import frame_times


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Two transport streams of two seconds each, as `cat a.ts b.ts` joins them."""
    parts = []
    for name, first in (("a.ts", 0), ("b.ts", 0)):
        video_track = VideoTrack(tuple(range(first, first + 2000, 40)), rate=25)
        parts.append(write_media(tmp_path / name, video_track, AudioTrack(tones(2.0, 48000), rate=48000)).read_bytes())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    return path


def test_decreasing_times_are_rejected_with_a_remedy(joined: Path) -> None:
    with pytest.raises(MediaError, match=r"go back.*ffmpeg -i \S*joined\.ts -c copy"):
        frame_times(joined)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_the_remedy_yields_both_recordings_in_order(joined: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.mkv"
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(joined), "-c", "copy", str(fixed)], check=True)
    times = frame_times(fixed)
    assert len(times) == 100
    assert np.diff(times).max() < 0.2
    assert times[-1] > 3.9


def test_decreasing_audio_times_are_rejected(joined: Path) -> None:
    with pytest.raises(MediaError, match="go back"):
        list(decode_audio(joined, start=1.4, duration=10.0))
