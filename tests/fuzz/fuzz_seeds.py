"""Small valid media files, one per common container and codec, as input of mutations."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

SIDE = (64, 48)
RATE, FRAMES = 25, 30
OPTIONS = {"libx265": {"x265-params": "log-level=none"}}
AUDIO_RATE = 16000


def write_film(
    path: Path, video: str = "libx264", audio: str | None = "aac", options: dict[str, str] | None = None
) -> Path:
    """Moving stripes and a tone, 1.2 s."""
    audio_rate = 48000 if audio == "libopus" else AUDIO_RATE
    with av.open(str(path), "w", options=options or {}) as out:
        video_stream: Any = out.add_stream(
            video, rate=RATE, options=OPTIONS.get(video, {}) | {"g": "10", "threads": "1"}
        )
        video_stream.width, video_stream.height = SIDE
        video_stream.pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
        audio_stream: Any = out.add_stream(audio, rate=audio_rate, layout="stereo") if audio else None
        for number in range(FRAMES):
            stripes = (np.arange(SIDE[0])[None, :, None] * 4 + 9 * number + np.zeros((SIDE[1], 1, 3))) % 256
            frame = av.VideoFrame.from_ndarray(stripes.astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(video_stream.encode(frame))
        out.mux(video_stream.encode(None))
        if audio_stream is not None:
            _add_tone(out, audio_stream, audio_rate)
    return path


def write_audio(path: Path, codec: str) -> Path:
    """Write an audio file with a tone."""
    with av.open(str(path), "w") as out:
        _add_tone(out, out.add_stream(codec, rate=AUDIO_RATE, layout="stereo"), AUDIO_RATE)
    return path


def _add_tone(out: Any, stream: Any, rate: int) -> None:
    time = np.arange(rate * FRAMES // RATE) / rate
    tone = (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    packed = np.repeat(tone[:, None], 2, axis=1)
    for begin in range(0, len(packed), 960):
        block = np.ascontiguousarray(packed[begin : begin + 960]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_image(path: Path) -> Path:
    """Write an image in the format of its extension."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (*SIDE, 3), np.uint8)).save(path)
    return path


FILMS: dict[str, Callable[[Path], Path]] = {
    "index-first.mp4": lambda path: write_film(path, options={"movflags": "faststart"}),
    "index-last.mp4": lambda path: write_film(path),
    "fragments.mp4": lambda path: write_film(path, options={"movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": lambda path: write_film(path, "libx265"),
    "clip.mov": lambda path: write_film(path, "mpeg4"),
    "xvid.avi": lambda path: write_film(path, "mpeg4", "libmp3lame"),
    "h264.avi": lambda path: write_film(path, "libx264", None),
    "mjpeg.avi": lambda path: write_film(path, "mjpeg", "pcm_s16le"),
    "h264.mkv": lambda path: write_film(path),
    "vp8.webm": lambda path: write_film(path, "libvpx", "libopus"),
    "vp9.webm": lambda path: write_film(path, "libvpx-vp9", "libopus"),
}
AUDIO_FILES: dict[str, Callable[[Path], Path]] = {
    "sound.wav": lambda path: write_audio(path, "pcm_s16le"),
    "sound.flac": lambda path: write_audio(path, "flac"),
    "sound.mp3": lambda path: write_audio(path, "libmp3lame"),
    "sound.m4a": lambda path: write_audio(path, "aac"),
}
IMAGE_FILES: dict[str, Callable[[Path], Path]] = {"face.jpg": write_image, "face.png": write_image}
SEEDS = FILMS | AUDIO_FILES | IMAGE_FILES
WHOLE_FILM = "index-first.mp4"


def write_seeds(folder: Path) -> Path:
    """Write all files."""
    for name, write in SEEDS.items():
        write(folder / name)
    return folder
