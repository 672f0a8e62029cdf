"""Media for a page: the file of a clip, whether browsers play it, and its audio level over time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from vaflow.datasets.files import walk
from vaflow.item_names import clip_and_person
from vaflow.timeline import Floats
from vaflow.viewer.predictions import PredictedClip

Image = NDArray[np.uint8]

# fmt: off
EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp", ".ogv",
    ".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus",
)
# fmt: on
CONTAINERS = frozenset({"mp4", "webm", "wav", "mp3", "ogg", "flac"})  # that Chromium, Firefox and Safari open
VIDEO_CODECS = frozenset({"h264", "vp8", "vp9", "av1"})
AUDIO_CODECS = frozenset({"aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le"})
RATE = 16_000  # samples per second for the waveform
HOP = 320  # samples per waveform column: 20 ms
MAX_HEIGHT = 720  # pixels of transcoded clips
_CLOCK = 90_000  # ticks per second of transcoded clips
_MIN_RANGE, _QUIET = 10.0, -50.0  # dB: a smaller range has no pauses; a lower level is silence


@dataclass(frozen=True)
class Facts:
    """Facts from a container: codecs ("" for a missing stream), pixel format, duration."""

    container: str
    video: str
    audio: str
    pixels: str
    seconds: float

    @property
    def playable(self) -> bool:
        """Whether current browsers play the file as it is."""
        return (
            not CONTAINERS.isdisjoint(self.container.split(","))
            and self.container.split(",")[0] != "matroska"
            and (not self.video or (self.video in VIDEO_CODECS and self.pixels in ("yuv420p", "yuvj420p")))
            and (not self.audio or self.audio in AUDIO_CODECS)
        )


class MediaIndex:
    """Media files below some directories, by name. Files are compared by the size that the cache recorded."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._by_name: dict[str, list[Path]] = {}
        for root in roots:
            for path in [root] if root.is_file() else _media_below(root):
                self._by_name.setdefault(path.name, []).append(path)

    @property
    def files(self) -> list[Path]:
        """All files, sorted."""
        return sorted(path for paths in self._by_name.values() for path in paths)

    def find(self, clip: PredictedClip) -> Path | None:
        """Return the clip's media file, or None.

        In this order: the path that `predict` recorded, a file with the name and size that the cache recorded, a file
        whose stem is the clip's id.
        """
        recorded = clip.source.get("media")
        if isinstance(recorded, str) and Path(recorded).is_file():
            return Path(recorded)
        for source in clip.records():
            for facts in (source.get("video"), source.get("audio")):
                if isinstance(facts, Mapping):
                    for path in self._by_name.get(str(facts.get("name")), ()):
                        if path.stat().st_size == facts.get("size"):
                            return path
        stems = {name.rsplit("/", 1)[-1] for name in (clip.item, clip_and_person(clip.item)[0])}
        same = [path for name, paths in self._by_name.items() if stems & {name, Path(name).stem} for path in paths]
        return same[0] if len(same) == 1 and not any(clip.records()) else None


def _media_below(root: Path) -> Iterator[Path]:
    for folder, files in walk(root):
        for entry in files:
            if entry.name.lower().endswith(EXTENSIONS):
                yield folder / entry.name


def probe(path: Path) -> Facts:
    """Return the codecs, pixel format and duration of a media file.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    with av.open(str(path), metadata_errors="replace") as media:
        audio = media.streams.audio[0].codec_context.codec.canonical_name if media.streams.audio else ""
        name = media.format.name
        if "matroska" in name:
            name = "webm" if path.suffix.lower() == ".webm" else "matroska"
        context = media.streams.video[0].codec_context if media.streams.video else None
        video, pixels = ("", "") if context is None else (context.codec.canonical_name, str(context.pix_fmt))
        return Facts(name, video, audio, pixels, (media.duration or 0) / av.time_base)


class Composer(Protocol):
    """Draws around or over the frames of a clip."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result for frames of a width and height."""

    def draw(self, image: Image, time: float) -> Image:
        """[H, W, 3] for one frame [h, w, 3], shown from `time` on (seconds on the clip clock)."""


def transcode(source: Path, target: Path, composer: Composer | None = None) -> None:
    """Write a clip as H.264 and AAC in MP4, with the presentation time of every frame kept.

    Raises:
        OSError, av.FFmpegError: the file cannot be decoded or written.
    """
    part = target.with_suffix(".part.mp4")
    with av.open(str(source), metadata_errors="replace") as media:
        first = next(iter(media.decode(video=0)), None) if media.streams.video else None
    with av.open(str(source), metadata_errors="replace") as media, av.open(str(part), "w", format="mp4") as out:
        start = (media.start_time or 0) / av.time_base
        encoders: dict[Any, _VideoEncoder | _AudioEncoder] = {}  # all added before the first packet
        if first is not None:
            encoders[media.streams.video[0]] = _VideoEncoder(out, media.streams.video[0], first, start, composer)
        if media.streams.audio:
            encoders[media.streams.audio[0]] = _AudioEncoder(out, start)
        for packet in media.demux(list(encoders)):
            try:
                frames: list[Any] = list(packet.decode())
            except av.FFmpegError:
                continue  # as browsers do: a damaged packet is skipped
            for frame in frames:
                encoders[packet.stream].add(frame)
        for encoder in encoders.values():
            encoder.finish()
    part.replace(target)


class _AudioEncoder:
    """AAC in stereo, from the time of the first samples on."""

    def __init__(self, out: Any, start: float) -> None:
        self._out, self._start = out, start
        self._stream = out.add_stream("aac", rate=48_000, layout="stereo")
        self._resampler = AudioResampler(format="fltp", layout="stereo", rate=48_000)
        self._samples: int | None = None

    def add(self, frame: Any) -> None:
        if self._samples is None:
            self._samples = max(0, round(((frame.time or self._start) - self._start) * 48_000))
        for piece in self._resampler.resample(frame):
            piece.pts, piece.time_base = self._samples, Fraction(1, 48_000)
            self._samples += piece.samples
            self._out.mux(self._stream.encode(piece))

    def finish(self) -> None:
        self._out.mux(self._stream.encode(None))


class _VideoEncoder:
    """H.264 at the times of the source, without reordering, with a key frame at least every 15 frames."""

    def __init__(self, out: Any, source: Any, first: Any, start: float, composer: Composer | None) -> None:
        self._out, self._base, self._start, self._last = out, source.time_base, start, -1
        self._composer = composer
        sides = (first.width, first.height)
        width, height = sides[::-1] if round(first.rotation / 90) % 2 else sides
        scale = min(1.0, MAX_HEIGHT / height)
        self._inner = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
        outer = self._inner if composer is None else composer.size(*self._inner)
        stream = self._stream = out.add_stream("libx264", rate=source.average_rate or 25)
        stream.width, stream.height = outer
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, _CLOCK)
        stream.codec_context.options = {"crf": "20", "preset": "veryfast", "bf": "0", "g": "15"}

    def add(self, frame: Any) -> None:
        if frame.pts is None:
            return
        time = float(frame.pts * self._base) - self._start
        turned = round(frame.rotation / 90) % 4
        shown = frame
        if turned or self._composer is not None:
            sides = self._inner[::-1] if turned % 2 else self._inner
            image = np.rot90(frame.reformat(*sides, "rgb24").to_ndarray(), turned)
            image = image if self._composer is None else self._composer.draw(image, time)
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        shown = shown.reformat(self._stream.width, self._stream.height, "yuv420p")
        self._last = max(round(time * _CLOCK), self._last + 1)
        shown.pts, shown.time_base, shown.pict_type = self._last, Fraction(1, _CLOCK), 0
        self._out.mux(self._stream.encode(shown))

    def finish(self) -> None:
        self._out.mux(self._stream.encode(None))


@dataclass(frozen=True)
class AudioLevel:
    """The audio of a clip in columns of 20 ms.

    Attributes:
        low, high: [N] int8, extreme samples of each column, full scale at 127.
        speech: [M, 2] seconds: spans whose energy is above the threshold.
    """

    low: NDArray[np.int8]
    high: NDArray[np.int8]
    speech: Floats


def audio_level(path: Path) -> AudioLevel | None:
    """Return waveform extremes and spans of speech-like energy; None without audio.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    low: list[NDArray[np.int16]] = []
    high: list[NDArray[np.int16]] = []
    power: list[Floats] = []
    for block in _blocks(path):
        columns = block[: len(block) // HOP * HOP].reshape(-1, HOP)
        low.append(columns.min(axis=1))
        high.append(columns.max(axis=1))
        power.append(np.square(columns.astype(np.float64) / 32768).mean(axis=1))
    if not low:
        return None
    lowest, highest = (np.round(np.concatenate(x) / 32768 * 127).astype(np.int8) for x in (low, high))
    return AudioLevel(lowest, highest, speech_spans(np.concatenate(power), HOP / RATE))


def _blocks(path: Path) -> Iterator[NDArray[np.int16]]:
    """Mono samples from the start of the clip in blocks of whole columns; gaps at the start are zeros."""
    with av.open(str(path), metadata_errors="replace") as media:
        if not media.streams.audio:
            return
        stream = media.streams.audio[0]
        resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
        rest: list[NDArray[np.int16]] = []
        first = True
        for packet in media.demux(stream):
            try:
                frames: list[Any] = list(packet.decode())
            except av.FFmpegError:
                continue
            for frame in frames:
                if first and frame.time is not None:
                    lead = round((frame.time - (media.start_time or 0) / av.time_base) * RATE)
                    rest.append(np.zeros(min(max(0, lead), 3600 * RATE), np.int16))
                    first = False
                rest += [piece.to_ndarray().reshape(-1).astype(np.int16) for piece in resampler.resample(frame)]
            if sum(map(len, rest)) >= 60 * RATE:
                block = np.concatenate(rest)
                whole = len(block) // HOP * HOP
                yield block[:whole]
                rest = [block[whole:]]
        if rest:
            yield np.concatenate(rest)


def speech_spans(power: Floats, step: float) -> Floats:
    """Spans whose energy is high for this clip, [M, 2] seconds.

    The threshold lies at 40 % between the 10th and the 95th percentile of the level in dB. Pauses under 0.3 s are
    closed and bursts under 0.1 s dropped. This detects energy, not voices: music counts.

    Args:
        power: [N] mean square of each column.
        step: seconds per column.
    """
    level = 10 * np.log10(np.maximum(power, 1e-10))
    floor, top = np.percentile(level, (10, 95)) if level.size else (0.0, 0.0)
    threshold = floor + 0.4 * (top - floor) if top - floor >= _MIN_RANGE else _QUIET
    active = level > max(threshold, _QUIET)
    spans = runs(active)
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and (begin - merged[-1][1]) * step < 0.3:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return np.array([(b * step, e * step) for b, e in merged if (e - b) * step >= 0.1], np.float64).reshape(-1, 2)


def runs(flag: Sequence[bool] | NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of indices where `flag` is True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(flag, bool), [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
