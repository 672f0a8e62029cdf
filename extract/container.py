"""Open and demux media files with FFmpeg, and read their frame times; its errors become MediaError.

Frame times come from one pass over the packets, which also shows whether the file is complete. There are two kinds of
containers. *Timed* ones (MP4, MOV, Matroska ...) store a presentation time with every packet: reading packets suffices
if every packet is one frame. Packets that decoding does not show (cut off by an edit list, or before the first frame
that decodes) are skipped. *Counted* ones (AVI, raw streams) store no times, and FFmpeg's guesses are one frame late for
H.264 and do not ascend with B-frames. There all frames are decoded, and the k-th decoded frame has the k-th decoding
time, which is the time intended by the program that wrote the file.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from pathlib import Path
from shlex import quote

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vaflow.encoders.preprocessing import MAX_PIXELS
from vaflow.errors import MediaError, explain
from vaflow.extract.config import MAX_PACKETS, check_span
from vaflow.extract.durations import promised_size
from vaflow.process import beat
from vaflow.timeline import Floats, median_interval

_MICROSECONDS = 1_000_000  # FFmpeg's container-wide clock
_PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})  # text files that name other files
_REPEATS, _SPARE = 4, 2**20  # the packets of a file may have this multiple of its size (edit lists), plus these bytes
SQUARE = Fraction(1)  # pixel aspect
# Codecs in which every packet is one displayed frame. Others have packets without one (invisible frames of VP8,
# empty frames of MPEG-4), so they are decoded.
_PACKET_IS_FRAME = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg"})
_COUNTED = frozenset({"avi", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu"})  # container names of FFmpeg
_SLACK_FRAMES = 2  # frames that may be missing at the end of an intact file
_SLACK_SECONDS = 0.25  # the same if the container states only a duration
_BACKWARD = 0.1  # seconds by which decoding times may go back; ffmpeg calls more than that a discontinuity
AUDIO_ROWS = 25  # rows per second of the clock of a clip that has no video


@dataclass(frozen=True)
class Opened:
    """An open file, its best video and audio streams (cover images do not count as video), and its clock.

    Attributes:
        pixel_aspect: width / height of a stored pixel of the video, from the container, else from the codec.
        start: seconds, the container's start time; the clip clock counts from here.
        duration: seconds of the whole file according to the container, or None.
    """

    path: Path
    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    start: float
    duration: float | None
    pixel_aspect: Fraction = SQUARE

    def need_video(self) -> VideoStream:
        """Return the video stream.

        Raises:
            MediaError: the file has none, or FFmpeg has no decoder for it.
        """
        if self.video is None:
            problem = f"{self.path} has no video stream"
            raise MediaError(explain(problem, expected="a file with a video stream", got=_listed(self.container)))
        if self.video.codec_context is None:
            raise MediaError(explain(f"{self.path} has a video stream that this FFmpeg cannot decode"))
        return self.video

    def clip_times(self, ticks: Iterable[int], stream: Stream) -> Floats:
        """Convert ticks of a stream to [N] seconds on the clip clock."""
        base = stream.time_base or Fraction(1, _MICROSECONDS)
        return np.fromiter((seconds(tick, base) for tick in ticks), np.float64) - self.start

    def stream_duration(self, stream: Stream) -> float | None:
        """Return the seconds of one stream according to the container, or None."""
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        parts = stream.metadata.get("DURATION", "").split(":")  # the tag of Matroska: "00:01:02.500000000"
        if len(parts) != 3:
            return None
        try:
            hours, minutes, rest = (float(part) for part in parts)
        except ValueError:
            return None
        return hours * 3600 + minutes * 60 + rest


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a media file and choose its streams.

    Raises:
        MediaError: the file is missing, empty, unreadable, no media file, or has neither video nor audio.
    """
    path = Path(path)
    with _open(path) as container:
        if container.format.name in _PLAYLISTS:
            raise MediaError(explain(f"{path} is a playlist", expected="a media file", got=container.format.name))
        video = container.streams.best("video")
        if video is not None and video.disposition & Disposition.attached_pic:
            video = None
        if isinstance(video, VideoStream) and video.codec_context is not None:
            video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the frame size may change within the file
        pixel_aspect = SQUARE
        if isinstance(video, VideoStream):
            aspect = video.sample_aspect_ratio
            pixel_aspect = aspect if aspect is not None and aspect > 0 else SQUARE  # 0: unknown
            if video.codec_context is not None:
                width, height = display_size(video.codec_context.width, video.codec_context.height, pixel_aspect)
                if width * height > MAX_PIXELS:
                    problem, expected = f"{path} claims frames that are too large", f"at most {MAX_PIXELS} pixels"
                    raise MediaError(explain(problem, expected=f"{expected} (8192 x 8192)", got=f"{width} x {height}"))
        audio = container.streams.best("audio")
        if video is None and audio is None:
            problem = f"{path} has neither video nor audio"
            raise MediaError(explain(problem, expected="a video file", got=_listed(container)))
        yield Opened(
            path=path,
            container=container,
            video=video if isinstance(video, VideoStream) else None,
            audio=audio if isinstance(audio, AudioStream) else None,
            start=(container.start_time or 0) / _MICROSECONDS,
            duration=container.duration / _MICROSECONDS if container.duration and container.duration > 0 else None,
            pixel_aspect=pixel_aspect,
        )


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise MediaError(explain(f"{path} is not a file", expected="a media file"))
    if path.stat().st_size == 0:
        raise MediaError(explain(f"{path} is empty", expected="a media file", got="0 bytes"))
    try:
        # "file:", because FFmpeg reads "12:30.mp4" as a protocol; the whitelist, because a text file may be a playlist
        # of URLs or other files.
        options = {"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (FFmpegError, ValueError, OverflowError) as error:  # PyAV raises the last two for invalid headers
        problem = f"{path} cannot be opened as a media file ({getattr(error, 'strerror', None) or error})"
        expected = "a video file that FFmpeg can read"
        got = f"{path.stat().st_size} bytes of another format, or a file truncated before its index"
        remedy = "Copy or download the file again, or check that it is a media file"
        raise MediaError(explain(problem, expected=expected, got=got, remedy=remedy)) from error


def _listed(container: InputContainer) -> str:
    """The kinds of the streams, for messages."""
    kinds = ["cover image" if s.disposition & Disposition.attached_pic else s.type for s in container.streams]
    return f"streams: {', '.join(kinds) or 'none'}"


def display_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Return (width, height) in square pixels: the stored size, enlarged in one direction."""
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def read_packets(media: Opened, streams: Sequence[Stream]) -> Iterator[Packet]:
    """Yield packets in file order, up to the end or the first unreadable position.

    Raises:
        MediaError: there are more packets than a file of this size can hold.
    """
    packets = media.container.demux(*streams)
    remaining = _REPEATS * media.path.stat().st_size + _SPARE
    for number in count():
        beat()
        try:
            packet = next(packets, None)
        except FFmpegError:
            return
        if packet is None or (packet.size == 0 and packet.dts is None):  # PyAV ends with an empty, flushing packet
            return
        remaining -= packet.size
        if remaining < 0 or number >= MAX_PACKETS:
            problem = f"{media.path} contains more packets than its size allows"
            expected = f"at most {MAX_PACKETS} packets, of no more bytes than the file has"
            got = "an index that repeats bytes, or a wrong count"
            remedy = "The file is damaged or malicious; remove it from the data set"
            raise MediaError(explain(problem, expected=expected, got=got, remedy=remedy))
        if packet.size:
            yield packet


def decode(media: Opened, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield every decoded frame, on one thread. Packets that do not decode are skipped, as in players."""
    stream.codec_context.thread_count = 1
    for packet in read_packets(media, [stream]):
        yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def decode_packet(stream: VideoStream, packet: Packet | None) -> list[VideoFrame]:
    """Return the frames that a packet completes; None flushes the decoder. Empty if the packet is damaged."""
    try:
        return stream.decode(packet)
    except FFmpegError:
        return []


def seconds(timestamp: int, time_base: Fraction) -> float:
    """Convert ticks to seconds, rounded once, so that equal ticks always give equal numbers."""
    return timestamp * time_base.numerator / time_base.denominator


@dataclass
class _Scan:
    """State of one pass over a file: ticks of the video stream, and the end of all streams in clip seconds."""

    pts: "array[int]" = field(default_factory=lambda: array("q"))  # 64 bits each: a few megabytes for hours of frames
    dts: "array[int]" = field(default_factory=lambda: array("q"))
    packets: int = 0  # whole packets of video
    decoded: int = 0  # decoded frames
    first: int | None = None  # presentation time of the first frame that decodes
    untimed: bool = False  # a packet that should have a presentation time has none
    backward: tuple[float, float] | None = None  # seconds, where decoding times first go back: from, to
    end: float = 0.0

    def add_end(self, packet: Packet, media: Opened) -> None:
        """Take the end time of a packet of any stream, and count and time whole packets of the video."""
        if packet.pts is not None:
            self.end = max(self.end, seconds(packet.pts + (packet.duration or 0), packet.time_base) - media.start)
        if packet.stream_index == media.need_video().index and not packet.is_corrupt:
            self.packets += 1
            if packet.dts is not None:
                if self.dts and self.backward is None:
                    before, now = media.clip_times([self.dts[-1], packet.dts], media.need_video())
                    self.backward = (before, now) if now < before - _BACKWARD else None
                self.dts.append(packet.dts)

    def add_packet(self, packet: Packet) -> None:
        """Take one packet as one frame, unless it is discarded or truncated."""
        if packet.is_discard or packet.is_corrupt:
            return
        if packet.pts is None:
            self.untimed = True
        else:
            self.pts.append(packet.pts)

    def add_frames(self, frames: list[VideoFrame], by_packet: bool) -> None:
        """Take decoded frames. With `by_packet`, only the first one counts: packets before it cannot be decoded."""
        for frame in frames:
            self.decoded += 1
            if frame.pts is None:
                continue
            if not by_packet:
                self.pts.append(frame.pts)
            elif self.decoded == 1:
                self.first = frame.pts


def is_counted(media: Opened) -> bool:
    """Return whether frames are numbered by counting, because the container has no presentation times."""
    return media.container.format.name in _COUNTED


def frame_times(path: Path) -> Floats:
    """Return the presentation time of every decoded frame, [N] seconds on the clip clock, ascending, N >= 1.

    Raises:
        MediaError: no video stream, nothing decodes, or the file is truncated.
    """
    with opened(path) as media:
        stream = media.need_video()
        by_packet = not is_counted(media) and stream.codec_context.name in _PACKET_IS_FRAME
        scan = _read(media, by_packet)
        if not (by_packet and scan.untimed):
            return _checked_times(media, scan)
    with opened(path) as media:
        return _checked_times(media, _read(media, by_packet=False))


def _read(media: Opened, by_packet: bool) -> _Scan:
    """Read all packets; decode all video, or with `by_packet` only up to the first frame."""
    stream = media.need_video()
    stream.codec_context.thread_count = 1
    scan = _Scan()
    # The streams that can extend to the container's end.
    streams = [s for s in media.container.streams if s.type in ("video", "audio", "subtitle")]
    for packet in read_packets(media, streams):
        scan.add_end(packet, media)
        if packet.stream_index != stream.index:
            continue
        if by_packet:
            scan.add_packet(packet)
        if not by_packet or not scan.decoded:
            scan.add_frames(decode_packet(stream, packet), by_packet)
    if not by_packet or not scan.decoded:
        scan.add_frames(decode_packet(stream, None), by_packet)
    return scan


def _checked_times(media: Opened, scan: _Scan) -> Floats:
    stream = media.need_video()
    if not scan.decoded:
        promised, present = _promised_frames(media, scan)
        expected = f"{promised or 'some'} frames of {stream.codec_context.name} video"
        got = f"{present} whole packets; none of them decodes"
        remedy = "The file is damaged or cut off; copy it again"
        raise MediaError(explain(f"No frame of {media.path} can be decoded", expected=expected, got=got, remedy=remedy))
    if scan.backward is not None:
        before, now = scan.backward
        raise several_recordings(media.path, "times", now, before)
    if is_counted(media):
        times = _counted_times(media, scan)
    else:
        shown = sorted(tick for tick in scan.pts if scan.first is None or tick >= scan.first)
        times = media.clip_times(shown, stream)
    # The container's start is rounded to microseconds: the first frame may seem to lie a fraction of one away from it.
    times = np.where(np.abs(times) < 1e-6, 0.0, times)
    check_span(media.path, times)
    _check_whole(media, scan, times)
    return times


def _counted_times(media: Opened, scan: _Scan) -> Floats:
    """Return the k-th decoding time for the k-th frame; times at the frame rate for raw streams, which store none."""
    stream = media.need_video()
    times = media.clip_times(sorted(scan.dts)[: scan.decoded], stream)
    step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
    after = times[-1] + step if times.size else 0.0
    return np.append(times, after + step * np.arange(scan.decoded - times.size))


def _check_whole(media: Opened, scan: _Scan, times: Floats) -> None:
    """Compare the file with its container's index of frames, else with the stated size, else with the duration.

    Raises:
        MediaError: more than two frames (a quarter of a second, without an index) are missing.
    """
    promised, present = _promised_frames(media, scan)
    if promised:
        if promised - present > _SLACK_FRAMES:
            raise _truncated(media, f"{promised} frames", f"{present} frames, up to {times[-1]:.2f} s")
        return
    size, whole_size = media.path.stat().st_size, promised_size(media.path)
    bytes_missing = whole_size is not None and whole_size > size
    if whole_size is not None and not bytes_missing:
        return
    step = median_interval(times)
    slack = _SLACK_FRAMES * step if bytes_missing else max(_SLACK_SECONDS, (_SLACK_FRAMES + 1) * step)
    lost = (media.duration or 0.0) - scan.end
    if lost > slack:
        raise _truncated(media, f"{media.duration:.2f} s", f"{scan.end:.2f} s")
    if bytes_missing and "matroska" not in media.container.format.name:  # a fragment states only its own size
        raise _truncated(media, f"{whole_size} bytes", f"{size} bytes, frames up to {times[-1]:.2f} s")


def _promised_frames(media: Opened, scan: _Scan) -> tuple[int, int]:
    """Return the number of video packets in the index (0: no index) and in the file."""
    stream = media.need_video()
    if "mov" in media.container.format.name and stream.frames:
        return len(stream.index_entries), scan.packets  # unlike `stream.frames`, the index respects edit lists
    if media.container.format.name == "avi":
        return stream.frames, max(scan.dts, default=-1) + 1  # one tick per frame; dropped frames have no packet
    return 0, scan.packets


def several_recordings(path: Path, kind: str, now: float, before: float) -> MediaError:
    """Return the error for times (`kind`: of what) that go back from `before` to `now` seconds."""
    problem = f"The {kind} of {path} go back: the file consists of several recordings"
    got = f"{now:.2f} s after {before:.2f} s"
    remedy = f"Rewrite the times: ffmpeg -i {quote(str(path))} -c copy NEW.mkv"
    return MediaError(explain(problem, expected="times that ascend", got=got, remedy=remedy))


def _truncated(media: Opened, promised: str, present: str) -> MediaError:
    problem = f"{media.path} is truncated: it holds less than its container states"
    return MediaError(explain(problem, expected=promised, got=present, remedy="Copy or download the file again"))


def audio_clock(path: Path) -> Floats:
    """Return row times [N] seconds of a clip without video, N >= 1: `AUDIO_ROWS` per second of audio.

    Raises:
        MediaError: no audio stream, no data in it, or the file is truncated.
    """
    with opened(path) as media:
        if media.audio is None:
            raise MediaError(explain(f"{path} has no audio stream", expected="an audio file"))
        end = 0.0
        for packet in read_packets(media, [media.audio]):
            if packet.pts is not None:
                end = max(end, seconds(packet.pts + (packet.duration or 0), packet.time_base) - media.start)
        if end <= 0:
            raise MediaError(explain(f"{path} holds no audio data", expected="an audio file"))
        promised = promised_size(path)
        if promised is not None and promised > path.stat().st_size:
            raise _truncated(media, f"{promised} bytes", f"{path.stat().st_size} bytes")
        times = np.arange(max(1, int(end * AUDIO_ROWS))) / AUDIO_ROWS
        check_span(path, times)
        return times
