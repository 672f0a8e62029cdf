"""Write small media files whose frames encode their number and whose audio encodes its time.

Every picture is a grid of 4 x 3 black or white blocks: the frame number in binary. Every half second of sound is a tone
of its own: `TONES[k]` during [k / 2, (k + 1) / 2) seconds. Both survive lossy codecs, odd sizes and turning.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

COLUMNS, ROWS = 4, 3
TONES = 400.0 + 150.0 * np.arange(16)  # hertz, by half second
TICKS = 1000  # per second: presentation times are given in milliseconds


@dataclass(frozen=True)
class AudioTrack:
    """An audio track: `samples` [channels, n] in -1 .. 1, starting at `start` seconds."""

    samples: NDArray[np.float64]
    rate: int = 44100
    codec: str = "aac"
    layout: str = "mono"
    start: float = 0.0


@dataclass(frozen=True)
class VideoTrack:
    """A video track: frame k is shown at `times[k]` milliseconds."""

    times: Sequence[float] = tuple(range(0, 1600, 40))
    size: tuple[int, int] = (160, 120)
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    rotation: int = 0
    noise: int = 0  # amplitude: makes frames larger when encoded
    # Store times as multiples of 1 / rate, for AVI or for 24000/1001.
    rate: int | Fraction | None = None
    square: bool = False  # draw only the middle square, which encoders see


def draw_number(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Draw `number`: [height, width, 3] uint8."""
    bits = [(number >> bit) & 1 for bit in range(COLUMNS * ROWS)]
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    blocks = np.array(bits, np.uint8).reshape(ROWS, COLUMNS)[rows][:, columns]
    return np.repeat((blocks * 200 + 28).astype(np.uint8)[:, :, None], 3, axis=2)


def read_number(image: NDArray[Any]) -> int:
    """Read the number drawn by `draw_number`."""
    height, width = image.shape[:2]
    ys = ((np.arange(ROWS) + 0.5) * height / ROWS).astype(int)
    xs = ((np.arange(COLUMNS) + 0.5) * width / COLUMNS).astype(int)
    bits = image[ys][:, xs].mean(axis=-1).ravel() > 128
    return int(sum(1 << bit for bit, on in enumerate(bits) if on))


def tones(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float64]:
    """[channels, n] audio with a different tone in each half second."""
    time = np.arange(round(seconds * rate)) / rate
    frequency = TONES[np.minimum((time * 2).astype(int), len(TONES) - 1)]
    return np.repeat(0.5 * np.sin(2 * np.pi * frequency * time)[None], channels, axis=0)


def strongest_tone(samples: NDArray[Any], rate: int) -> int:
    """Index of the strongest tone in a span of audio; -1 for silence."""
    if np.abs(samples).max() < 1e-3:
        return -1
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 15))
    loudest = np.argmax(spectrum) * rate / (1 << 15)
    return int(np.argmin(np.abs(TONES - loudest)))


def write_media(
    path: Path,
    video_track: VideoTrack | None = None,
    audio_track: AudioTrack | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a media file; the extension selects the container, `options` are muxer options (movflags ...)."""
    with av.open(str(path), "w", options=options or {}) as container:
        packets = []
        if video_track is not None:
            packets.append(_video(container, video_track))
        if audio_track is not None:
            packets.append(_audio(container, audio_track))
        for track in packets:
            for packet in track:
                container.mux(packet)
    return path


def _video(container: Any, video_track: VideoTrack) -> Iterable[Any]:
    quiet = {"x265-params": "log-level=none"} if video_track.codec == "libx265" else {}
    stream = container.add_stream(
        video_track.codec, rate=video_track.rate or 25, options={**quiet, **video_track.options}
    )
    stream.width, stream.height = video_track.size
    stream.pix_fmt = video_track.pixel_format
    ticks = Fraction(video_track.rate or TICKS)
    if video_track.rate is None:
        stream.codec_context.time_base = Fraction(1, TICKS)
    if video_track.rotation:
        stream.set_display_rotation(video_track.rotation)

    random = np.random.default_rng(0)

    def encode() -> Iterable[Any]:
        for number, time in enumerate(video_track.times):
            image = drawn(number, video_track)
            grain = random.integers(-video_track.noise, video_track.noise + 1, image.shape)
            image = (image + grain).clip(0, 255).astype(np.uint8)
            image = np.ascontiguousarray(np.rot90(image, -video_track.rotation // 90))
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=video_track.pixel_format)
            frame.pts, frame.time_base = round(time * ticks / TICKS), 1 / ticks
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return encode()


def drawn(number: int, video_track: VideoTrack) -> NDArray[np.uint8]:
    """A frame of the track as it is shown."""
    width, height = _shown_size(video_track)
    if not video_track.square:
        return draw_number(number, width, height)
    side = min(width, height)
    image = np.full((height, width, 3), 128, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = draw_number(number, side, side)
    return image


def _shown_size(video_track: VideoTrack) -> tuple[int, int]:
    width, height = video_track.size
    return (height, width) if video_track.rotation % 180 else (width, height)


def _audio(container: Any, audio_track: AudioTrack, block: int = 1024) -> Iterable[Any]:
    stream = container.add_stream(audio_track.codec, rate=audio_track.rate, layout=audio_track.layout)

    def encode() -> Iterable[Any]:
        whole = (np.clip(audio_track.samples, -1, 1) * 32767).astype(np.int16)
        for begin in range(0, whole.shape[1], block):
            packed = np.ascontiguousarray(whole[:, begin : begin + block].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=audio_track.layout)
            frame.sample_rate, frame.time_base = audio_track.rate, Fraction(1, audio_track.rate)
            frame.pts = begin + round(audio_track.start * audio_track.rate)
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return encode()


def cut(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def copy_from_keyframe(source: Path, target: Path, which: int) -> Path:
    """Copy the streams from the `which`-th keyframe on, as some cutting tools do."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        video = old.streams.video[0]
        stream = new.add_stream_from_template(video)
        keyframes = -1
        for packet in old.demux(video):
            keyframes += packet.is_keyframe
            if keyframes >= which and packet.size:
                packet.stream = stream
                new.mux(packet)
    return target
