"""Clips that encode frame number and time in their content, and encoders that decode them.

Every picture shows its number. The sound is a sequence of tones that never repeats: a new one every 50 ms, chosen by
the time of the file's clock. So whatever lands in a cache can be asked which frame and which moment it is.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import torch
from make_media import COLUMNS, ROWS, AudioTrack, VideoTrack, drawn, write_media
from numpy.typing import NDArray

from vaflow.encoders.base import KALDI, Segments
from vaflow.encoders.preprocessing import Preparation

Floats = NDArray[np.float64]

SECONDS = 3.6
TONE = 0.05  # seconds
RATE = 16_000
SIZE = (160, 120)


@cache
def _frequencies() -> Floats:
    return np.random.default_rng(1).permutation(np.geomspace(300, 5000, 400))


def audio_at(times: Floats) -> Floats:
    """Audio samples at times [n] in seconds of the file's clock, within -0.5 .. 0.5."""
    frequency = _frequencies()
    step = np.clip((times / TONE).astype(int), 0, len(frequency) - 1)
    into = times - step * TONE
    fade = np.clip(np.minimum(into, TONE - into) / 0.002, 0, 1)  # smooth edges: codecs smear clicks
    wave: Floats = 0.5 * fade * np.sin(2 * np.pi * frequency[step] * into)
    return wave


def track(
    seconds: float = SECONDS, *, rate: int = 44100, channels: int = 1, start: float = 0.0, codec: str = "aac"
) -> AudioTrack:
    """An audio track whose sample at `start` + n / rate seconds encodes that time."""
    wave = audio_at(start + np.arange(round(seconds * rate)) / rate)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    return AudioTrack(np.repeat(wave[None], channels, axis=0), rate, codec, layout, start)


def even(rate: float | Fraction, start: float = 0.0) -> tuple[float, ...]:
    """Milliseconds of frames at a constant rate."""
    return tuple(1000 * (start + k / float(rate)) for k in range(round(SECONDS * rate)))


def uneven(start: int = 0) -> tuple[int, ...]:
    """Milliseconds of frames at irregular intervals, up to about `SECONDS`."""
    times = start + np.cumsum([0, *np.random.default_rng(0).choice([20, 33, 40, 120, 300], 200)])
    return tuple(times[times < start + 1000 * SECONDS].tolist())


@dataclass(frozen=True)
class Case:
    """A media file and its ground truth.

    Attributes:
        name: the file's.
        picture, sound: what is written.
        cut: seconds that an edit list takes away in front.
        finish: what happens to the file afterwards.
        write: writes the file itself, in the place of `write_media`.
        labels: the column of its label file: "frame" or "time".
    """

    name: str
    video_track: VideoTrack
    audio_track: AudioTrack | None = None
    cut: float = 0.0
    finish: Callable[[Path], None] | None = None
    write: Callable[[Path, "Case"], None] | None = None
    labels: str = "frame"
    muxer: dict[str, str] = field(default_factory=dict)

    @property
    def written(self) -> Floats:
        """[N] seconds of every frame that was written, on the file's clock."""
        times = np.array(self.video_track.times) / 1000
        ticks = float(self.video_track.rate or 1000)
        return np.round(times * ticks) / ticks

    @property
    def first(self) -> int:
        """Number of the first frame that is shown."""
        return int(np.flatnonzero(self.written >= self.cut - 1e-6)[0])

    @property
    def origin(self) -> float:
        """Start of the clip in seconds of the file's clock: its first frame or audio sample."""
        starts = [self.written[self.first]] + ([max(self.audio_track.start, self.cut)] if self.audio_track else [])
        return float(min(starts))

    def make(self, folder: Path) -> None:
        """Write the file and a label file whose values encode the frame number."""
        path = folder / self.name
        if self.write is not None:
            self.write(path, self)
        else:
            write_media(path, self.video_track, self.audio_track, self.muxer)
        if self.finish is not None:
            self.finish(path)
        shown = range(self.first, len(self.written))
        if self.labels == "frame":
            rows = [f"{k},{label_of(number)},{-label_of(number)}" for k, number in enumerate(shown)]
        else:
            times = self.written - self.origin
            rows = [f"{times[number]:.6f},{label_of(number)},{-label_of(number)}" for number in shown]
        path.with_suffix(".csv").write_text("\n".join([f"{self.labels},valence,arousal", *rows]) + "\n")


def label_of(number: int) -> float:
    """The valence of a frame; its arousal is the opposite."""
    return number / 1000


# --- files that a plain muxer does not write


def trim(seconds: float) -> Callable[[Path], None]:
    """Shift the start of an MP4's edit lists by some seconds; earlier content stays in the file, hidden."""

    def rewrite(path: Path) -> None:
        data = bytearray(path.read_bytes())
        movie = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
        at = data.find(b"trak")
        while at >= 0:
            timescale = struct.unpack_from(">I", data, data.index(b"mdhd", at) + 16)[0]
            entry = data.index(b"elst", at) + 12
            duration, media_time = struct.unpack_from(">Ii", data, entry)
            new = duration - round(seconds * movie), media_time + round(seconds * timescale)
            struct.pack_into(">Ii", data, entry, *new)
            at = data.find(b"trak", at + 4)
        path.write_bytes(data)

    return rewrite


def transport_stream(path: Path, case: Case) -> None:
    """An MPEG transport stream, by whatever name."""
    write_media(path.with_suffix(".ts"), case.video_track, case.audio_track).rename(path)


def drifting(percent: float) -> Callable[[Path, Case], None]:
    """Write correct timestamps with too few or too many audio samples (clock drift)."""

    def write(path: Path, case: Case) -> None:
        rate, block = RATE, 800
        fast = rate * (1 + percent / 100)  # samples per true second
        count = round(SECONDS * fast)
        wave = audio_at(np.arange(count) / fast)
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
            audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
            packets: list[Any] = []
            for number in range(len(case.video_track.times)):
                frame = av.VideoFrame.from_ndarray(drawn(number, case.video_track), "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                packets += video.encode(frame)
            packets += video.encode(None)
            for begin in range(0, count, block):
                samples = (wave[begin : begin + block] * 32767).astype(np.int16)[None]
                block_frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
                block_frame.sample_rate, block_frame.time_base = rate, Fraction(1, rate)
                block_frame.pts = round(begin / fast * rate)
                packets += audio.encode(block_frame)
            packets += audio.encode(None)
            for packet in packets:
                container.mux(packet)

    return write


# --- encoders that decode the content


class NumberReader:
    """A visual encoder: the bits of the number that a picture shows."""

    kind: ClassVar[str] = "visual"
    name = "numbers"
    dim = COLUMNS * ROWS
    image_size = 96
    preparation = Preparation(96)
    identity: dict[str, Any] = {"encoder": "numbers"}  # noqa: RUF012 - the protocol says so
    module: torch.nn.Module = torch.nn.Identity()

    def prepare(self, image: Any) -> Any:
        return self.preparation(image)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 96, 96, 3] -> [B, 12], 1 where the middle of a block is light."""
        ys = ((torch.arange(ROWS) + 0.5) * self.image_size / ROWS).long()
        xs = ((torch.arange(COLUMNS) + 0.5) * self.image_size / COLUMNS).long()
        blocks = images[:, ys][:, :, xs].float().mean(-1).flatten(1)
        return (blocks > 128).float()


def numbers_of(embedding: NDArray[Any]) -> NDArray[np.int64]:
    """[T, 12] bits -> [T] numbers."""
    bits = np.asarray(embedding, np.float64) > 0.5
    return (bits * (1 << np.arange(bits.shape[1]))).sum(1).astype(np.int64)


class ToneReader:
    """An audio encoder: the mean filter bank of each step."""

    kind: ClassVar[str] = "audio"
    name = "tones"
    dim = 128
    identity: dict[str, Any] = {"encoder": "tones"}  # noqa: RUF012
    front_end = KALDI
    module: torch.nn.Module = torch.nn.Identity()

    def segments(self, window: float, steps: int) -> Segments:
        return Segments((0,), round(100 * window))

    def step_times(self, window: float, steps: int) -> Floats:
        return (np.arange(steps) + 0.5) * window / steps

    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        frames = round(100 * window)
        padded = torch.nn.functional.pad(logmel, (0, 0, 0, frames - logmel.shape[1]))
        return padded.reshape(len(logmel), steps, frames // steps, -1).mean(2)


# --- audio delay


def banks(samples: Floats) -> Floats:
    """[F, 128] filter banks of 16 kHz audio: torchaudio's, with the AST settings."""
    from torchaudio.compliance import kaldi

    wave = torch.from_numpy(samples.astype(np.float32))[None]
    wave = wave - wave.mean()
    frames = kaldi.fbank(
        wave, htk_compat=True, sample_frequency=RATE, use_energy=False, window_type="hanning", num_mel_bins=128,
        dither=0.0, frame_shift=10,
    )  # fmt: skip
    return np.asarray(frames, np.float64)


def lateness(frames: Floats, first: int, origin: float, reach: float = 0.08) -> float:
    """Delay in seconds of filter-bank frames relative to the encoded time, by the best-fitting shift.

    Args:
        frames: [F, 128], frame i of the clip at [first + i].
        first: number of the first one; it covers 25 ms from 0.01 * first s of the clip.
        origin: the file's clock at the clip's time 0.
        reach: seconds up to which shifts are tried.
    """
    loudness = _loud(frames)
    count = (len(frames) + 2) * 160  # samples that the frames cover, and up to a whole step

    def best(shifts: Floats) -> float:
        """The shift whose audio fits best; one call of the filter bank for all."""
        times = origin + first * 0.01 + np.arange(count) / RATE - shifts[:, None]
        tried = banks(np.concatenate([audio_at(row) for row in times]))
        misses = [
            ((_loud(tried[k * count // 160 :][: len(frames)]) - loudness) ** 2).mean() for k in range(len(shifts))
        ]
        return float(shifts[np.argmin(misses)])

    coarse = best(np.arange(-reach, reach + 1e-9, 0.005))
    return best(coarse + np.arange(-0.005, 0.00501, 0.001))


def _loud(frames: Floats) -> Floats:
    """The loudest bands of each frame; codecs and noise fill the others."""
    level: Floats = np.maximum(frames - frames.max(1, keepdims=True), -6.0)
    return level
