"""Audio of any file -> mono 16 kHz on the clip clock, in bounded memory; masks of its frames, and speech activity.

Sample n of the stream of blocks lies at n / 16000 s of the clip, from 0 on. Where the file has no audio (it starts
late, has a gap, lost a packet) zeros are inserted, and the summary's intervals leave them out. Timestamps that jitter
by less than 25 ms are not followed: chopping a steady signal does more harm. Where they stay on one side, the
recorder's audio clock was off: the audio is resampled a little, so that it stays with its times (`_Drift`).

Mono is the mean of the channels, taken before resampling. libswresample's own downmix is not used: for float samples
it scales stereo by 0.707 instead of 0.5, so that level would depend on the number of channels and clip.

Speech activity is energy clearly above the background. No model: music as loud as speech counts as speech. In a clip
with one speaker and a quiet background, that is enough to tell a speaking mouth from a chewing one.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from av.audio.frame import AudioFrame, format_dtypes
from av.audio.resampler import AudioResampler
from av.error import FFmpegError
from av.packet import Packet
from numpy.typing import NDArray

from vaflow.encoders import logmel
from vaflow.extract.config import AUDIO_RATES, MAX_CHANNELS
from vaflow.extract.container import Opened, opened, read_packets, seconds, several_recordings
from vaflow.timeline import Bools, Floats, Grid, Ints

RATE = 16000  # output samples per second
SILENT_PEAK = 1e-4  # -80 dBFS: an audio stream that never exceeds this is silent

_JITTER = 0.025  # seconds that a timestamp may be off
_JITTER_AFTER_DAMAGE = 0.002  # ... where a packet was lost: one AAC frame is 21 to 23 ms, which must leave a gap
_DRIFT = 0.004  # seconds that timestamps may keep to one side
_DRIFT_PIECES, _DRIFT_SPAN = 16, 0.5  # pieces, and seconds, with consistent lateness before it is corrected
_MAX_CHANGE = 0.05  # largest share by which a piece is lengthened or shortened
_BACKWARD = 1.0  # seconds by which the times of a stream may go back
_SHORT = 0.1  # seconds that may be missing from a clip's audio
_FEED = 16384  # samples passed to the resampler
_ZEROS = 10 * RATE  # the longest block of zeros
_PLANES = 8  # from so many on, PyAV reads beyond the last plane of a frame
_FULL_SCALE = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31}

Block = NDArray[np.float32]
Blocks = Generator[Block, None, "AudioSummary"]
Status = Literal["ok", "absent", "silent", "short", "unreadable"]
HOP = logmel.HOP / logmel.RATE  # seconds between two filter-bank frames
_FRAME = logmel.FRAME / logmel.RATE  # seconds that one covers
_ROUNDING = HOP / 2  # resampling rounds the ends of the audio by a fraction of a sample
METHOD = "energy"  # name of the measure, as records state it
MIN_ABOVE_FLOOR = 9.0  # dB above the background
MIN_LEVEL = -55.0  # dB below full scale; quieter is silence
FLOOR_PERCENTILE = 10
HANGOVER = 0.2  # seconds around loud frames that count as speech: the pauses between syllables


@dataclass(frozen=True)
class AudioSummary:
    """Summary of a clip's audio. No status is an error.

    Attributes:
        status: "absent" (no audio stream), "unreadable" (nothing decodes), "silent" (peak below -80 dBFS), "short"
            (more than 0.1 s of the clip has no audio data), "ok".
        samples: how many came out, at 16 kHz.
        covered: (start, stop) in clip seconds of what came from the file, ascending, apart from each other.
        peak: largest absolute sample of the mono signal; 1 is full scale.
        rate, channels, codec: of the stream in the file; 0 and "" where absent.
        damaged: packets that did not decode.
    """

    status: Status
    samples: int = 0
    covered: tuple[tuple[float, float], ...] = ()
    peak: float = 0.0
    rate: int = 0
    channels: int = 0
    codec: str = ""
    damaged: int = 0


def decode_audio(path: Path, *, start: float, duration: float) -> Blocks:
    """Decode a file's best audio stream.

    Args:
        path: a media file; it may have no audio.
        start: seconds, `MediaInfo.start` of the file that gives the clip clock.
        duration: seconds, the clip's duration; audio beyond it is cut.

    Yields:
        [n] float32 at 16 kHz, gapless from clip time 0 to the end of the audio or of the clip.

    Returns:
        AudioSummary (the generator's return value).

    Raises:
        MediaError: the file cannot be opened at all.
    """
    with opened(path) as media:
        if media.audio is None or media.audio.codec_context is None:
            return AudioSummary("absent")
        context = media.audio.codec_context
        line, source = _Line(limit=round(max(duration, 0.0) * RATE)), _Source(media, start)
        for piece in source.pieces():
            yield from line.add(piece)
            if line.full:
                break
        yield from line.close()
        covered = sum(stop - start for start, stop in line.covered) / RATE
        status: Status = "short" if covered < duration - _SHORT else "ok"
        if not source.rate:
            status = "unreadable"
        elif line.covered and line.peak < SILENT_PEAK:
            status = "silent"
        return AudioSummary(
            status=status,
            samples=line.emitted,
            covered=tuple((a / RATE, b / RATE) for a, b in line.covered),
            peak=line.peak,
            rate=source.rate or context.sample_rate,
            channels=source.channels or context.channels,
            codec=context.name,
            damaged=source.damaged,
        )


def pass_on(blocks: Blocks, take: Callable[[Block], object]) -> AudioSummary:
    """Call `take` with every block, and return the summary."""
    while True:
        try:
            block = next(blocks)
        except StopIteration as end:
            summary: AudioSummary = end.value
            return summary
        take(block)


@dataclass(frozen=True)
class _Piece:
    """Decoded mono samples, their start on the clip clock (None: right after the previous ones), and its jitter."""

    samples: Block
    rate: int
    time: float | None
    jitter: float


class _Source:
    """Decodes an audio stream packet by packet; damaged packets are counted and skipped."""

    def __init__(self, media: Opened, start: float) -> None:
        self._media, self._start = media, start
        self.rate = self.channels = self.damaged = 0
        self._last = -np.inf  # seconds, of the previous piece

    def pieces(self) -> Iterator[_Piece]:
        stream = self._media.audio
        if stream is None:
            return
        stream.codec_context.thread_count = 1
        known = 0  # damaged packets before the last piece
        for packet in chain(read_packets(self._media, [stream]), [None]):
            for frame in self._decode(packet):
                # PyAV cannot convert 64-bit integers.
                usable = frame.format.name in format_dtypes and AUDIO_RATES[0] <= frame.sample_rate <= AUDIO_RATES[1]
                samples = _mono(frame) if usable else None
                if samples is None:
                    self.damaged += 1
                    continue
                self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
                time = None
                if frame.pts is not None and stream.time_base is not None:
                    time = seconds(frame.pts, stream.time_base) - self._start
                    if time < self._last - _BACKWARD:
                        raise several_recordings(self._media.path, "audio times", time, self._last)
                    self._last = time
                yield _Piece(samples, self.rate, time, _JITTER if self.damaged == known else _JITTER_AFTER_DAMAGE)
                known = self.damaged

    def _decode(self, packet: Packet | None) -> list[AudioFrame]:
        stream = self._media.audio
        try:
            return [] if stream is None else list(stream.codec_context.decode(packet))
        except FFmpegError:
            self.damaged += 1
            return []


def _mono(frame: AudioFrame) -> Block | None:
    """The mean of the channels, [n] float32, full scale 1; None if there are more than `MAX_CHANNELS`."""
    if frame.format.is_planar and frame.layout.nb_channels >= _PLANES:
        # PyAV reads beyond the last of eight or more planes, and may crash: such frames are interleaved first.
        if frame.layout.nb_channels > MAX_CHANNELS:
            return None
        try:
            packed, layout = frame.format.packed.name, frame.layout.name
            frame = AudioResampler(format=packed, layout=layout, rate=frame.sample_rate).resample(frame)[0]
        except (FFmpegError, ValueError, IndexError):
            return None
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    scale = _FULL_SCALE.get(data.dtype.str[1:])
    mono = data.mean(axis=0, dtype=np.float64)
    if scale is not None:
        mono = (mono - (scale if data.dtype == np.uint8 else 0.0)) / scale
    return np.nan_to_num(mono, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)


@dataclass
class _Line:
    """The 16 kHz output: gapless segments of audio, each with its own resampler.

    Attributes:
        limit: samples at which the output ends.
        emitted: samples of output so far.
        covered: (start, stop) in samples of audio from the file, without inserted zeros.
    """

    limit: int
    emitted: int = 0
    peak: float = 0.0
    covered: list[tuple[int, int]] = field(default_factory=list)
    _segment: "_Segment | None" = None
    _drift: "_Drift" = field(default_factory=lambda: _Drift())

    @property
    def full(self) -> bool:
        return self.emitted >= self.limit

    def add(self, piece: _Piece) -> Iterator[Block]:
        """Append a piece to the current segment, or start a new one after zeros."""
        end = self.emitted / RATE if self._segment is None else self._segment.end
        time = end if piece.time is None else piece.time
        late = time - end
        steady = self._segment is not None and abs(late) <= piece.jitter
        samples = piece.samples
        if late < 0 and not steady:  # before the clip, or a repetition
            samples = samples[round(-late * piece.rate) :]
            time = end
        if not samples.size:
            return
        if steady and piece.time is not None:
            samples = self._drift.follow(samples, piece.rate, piece.time, late)
        if self._segment is None or self._segment.rate != piece.rate or (late > 0 and not steady):
            self._drift = _Drift()
            yield from self.close()
            yield from self._zeros(round(time * RATE) - self.emitted)
            self._segment = _Segment(self.emitted / RATE, piece.rate)
        yield from self._out(self._segment.push(samples))

    def close(self) -> Iterator[Block]:
        """End the current segment: flush its resampler."""
        if self._segment is not None:
            yield from self._out(self._segment.flush())
            self._segment = None

    def _zeros(self, count: int) -> Iterator[Block]:
        count = min(count, self.limit - self.emitted)
        while count > 0:
            block = np.zeros(min(count, _ZEROS), np.float32)
            self.emitted += block.size
            count -= block.size
            yield block

    def _out(self, blocks: Iterator[Block]) -> Iterator[Block]:
        for whole in blocks:
            block = whole[: self.limit - self.emitted]
            if not block.size:
                continue
            start, self.emitted = self.emitted, self.emitted + block.size
            self.peak = max(self.peak, float(np.abs(block).max()))
            if self.covered and self.covered[-1][1] == start:
                start = self.covered.pop()[0]
            self.covered.append((start, self.emitted))
            yield block


class _Drift:
    """Corrects the drift of an audio clock against its timestamps.

    An audio clock that is off by 0.1 % is a second late after a quarter of an hour. Jitter goes both ways; only when
    many pieces in a row are late, or many early, the line through their lateness is corrected.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()
        self._owed = 0.0  # seconds to insert; negative: to remove

    def follow(self, samples: Block, rate: int, time: float, late: float) -> Block:
        """The piece, possibly resampled, [n'] float32; `late`: seconds from the end of the last piece to its time."""
        if not self._owed:
            self._watch(time, late)
        most = _MAX_CHANGE * samples.size
        change = round(min(max(self._owed * rate, -most), most))
        if not change:
            self._owed = 0.0
            return samples
        self._owed -= change / rate
        where = np.linspace(0, samples.size - 1, samples.size + change)
        return np.interp(where, np.arange(samples.size), samples).astype(np.float32)

    def _watch(self, time: float, late: float) -> None:
        self._recent.append((time, late))
        while len(self._recent) > _DRIFT_PIECES and time - self._recent[1][0] >= _DRIFT_SPAN:
            self._recent.popleft()
        if len(self._recent) < _DRIFT_PIECES or time - self._recent[0][0] < _DRIFT_SPAN:
            return
        times, lates = np.array(self._recent).T
        if (lates > 0).all() or (lates < 0).all():
            now = float(np.polyval(np.polyfit(times - time, lates, 1), 0.0))
            if abs(now) > _DRIFT:
                self._owed = now
                self._recent.clear()


class _Segment:
    """Gapless samples of one rate and their resampler; n input samples give round(n * 16000 / rate) output samples."""

    def __init__(self, start: float, rate: int) -> None:
        self.start, self.rate = start, rate
        self._resampler = AudioResampler(format="fltp", layout="mono", rate=RATE)
        self._waiting: list[Block] = []
        self._in = self._fed = self._out = 0

    @property
    def end(self) -> float:
        """Clip seconds right after the last input sample."""
        return self.start + self._in / self.rate

    def push(self, samples: Block) -> Iterator[Block]:
        self._waiting.append(samples)
        self._in += samples.size
        if self._in - self._fed >= _FEED:
            yield from self._feed()

    def flush(self) -> Iterator[Block]:
        yield from self._feed()
        if self.rate != RATE:
            yield from self._count(self._resampler.resample(None))
        missing = round(self._in * RATE / self.rate) - self._out
        if missing > 0:  # the resampler rounds down
            self._out += missing
            yield np.zeros(missing, np.float32)

    def _feed(self) -> Iterator[Block]:
        if not self._waiting:
            return
        frame = AudioFrame.from_ndarray(np.concatenate(self._waiting)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self._fed, Fraction(1, self.rate)
        self._waiting, self._fed = [], self._in
        yield from self._count(self._resampler.resample(frame))

    def _count(self, frames: list[AudioFrame]) -> Iterator[Block]:
        for frame in frames:
            block = frame.to_ndarray()[0].astype(np.float32)
            block = block[: max(0, round(self._in * RATE / self.rate) - self._out)]
            self._out += block.size
            yield block


def covered_frames(frames: int, covered: tuple[tuple[float, float], ...]) -> Bools:
    """[F] True where all samples of a filter-bank frame came from the file."""
    first = np.arange(frames) * HOP
    valid = np.zeros(frames, bool)
    for start, stop in covered:
        valid |= (first >= start - _ROUNDING) & (first + _FRAME <= stop + _ROUNDING)
    return valid


def step_valid(valid: Bools, starts: Floats, window: float, steps: int, duration: float) -> Bools:
    """[W, S] True where at least half of the frames under a step are valid; frames after the clip do not count."""
    sums = np.concatenate([[0], np.cumsum(valid)])
    edges = _edges(starts, window, steps)
    counts = np.diff(sums[np.clip(edges, 0, len(valid))], axis=1)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    result: NDArray[np.bool_] = (inside > 0) & (counts * 2 >= inside)
    return result


def ends_in_a_short_step(grid: Grid, steps: int, duration: float) -> bool:
    """Whether less than half of some step lies within the clip; reading version 2 marked such steps as missing."""
    edges = _edges(grid.seconds(grid.starts(duration)), grid.window, steps)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    return bool(((inside > 0) & (inside * 2 < np.diff(edges, axis=1))).any())


def _edges(starts: Floats, window: float, steps: int) -> Ints:
    """[W, S + 1] numbers of the frames at which the steps begin and end."""
    return np.rint((starts[:, None] + np.arange(steps + 1) * window / steps) / HOP).astype(np.int64)


def _frames_within(duration: float) -> int:
    """Number of frames that end within a clip."""
    return max(0, int((duration - _FRAME + _ROUNDING) / HOP) + 1)


def speech_frames(levels: Floats) -> Bools:
    """[F] True during speech.

    Args:
        levels: [F] dB, one per `HOP`; 0 is full scale.
    """
    if not len(levels):
        return np.zeros(0, bool)
    floor = max(float(np.percentile(levels, FLOOR_PERCENTILE)), MIN_LEVEL - MIN_ABOVE_FLOOR)
    loud = (levels >= MIN_LEVEL) & (levels >= floor + MIN_ABOVE_FLOOR)
    reach = round(HANGOVER / HOP)
    return np.convolve(loud, np.ones(2 * reach + 1), mode="full")[reach : reach + len(loud)] > 0.5


def stored_speech(measured: Bools, valid: Bools) -> Bools:
    """[F] speech of each log-Mel frame: that of the 10 ms at which it begins, where the frame is `valid` [F]."""
    speech = np.zeros(len(valid), bool)
    measured = measured[: len(valid)]
    speech[: len(measured)] = measured
    return speech & valid


class SpeechMeter:
    """Speech of a clip from its samples, block by block."""

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.float32)
        self._levels: list[NDArray[np.float32]] = []

    def push(self, samples: NDArray[np.float32]) -> None:
        """The next samples [n]."""
        samples = np.concatenate([self._rest, samples])
        count = len(samples) // logmel.HOP
        self._rest = samples[count * logmel.HOP :]
        power = np.square(samples[: count * logmel.HOP].reshape(count, logmel.HOP), dtype=np.float64).mean(axis=1)
        self._levels.append((10 * np.log10(np.maximum(power, 1e-12))).astype(np.float32))

    def finish(self) -> Bools:
        """[F] True during speech, one per `HOP` from time 0."""
        return speech_frames(np.concatenate(self._levels) if self._levels else np.zeros(0))
