"""Open and demux media files with FFmpeg; its errors become MediaError."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vaflow.errors import MediaError, explain
from vaflow.extract.config import MAX_PACKETS
from vaflow.images import MAX_PIXELS
from vaflow.process import beat

_MICROSECONDS = 1_000_000  # FFmpeg's container-wide clock
_PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})  # text files that name other files
_REPEATS, _SPARE = 4, 2**20  # the packets of a file may have this multiple of its size (edit lists), plus these bytes
SQUARE = Fraction(1)  # pixel aspect


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
            raise MediaError(
                explain(
                    f"{self.path} has no video stream",
                    expected="a file with a video stream",
                    got=f"streams: {', '.join(s.type for s in self.container.streams) or 'none'}",
                )
            )
        if self.video.codec_context is None:
            raise MediaError(explain(f"{self.path} has a video stream that this FFmpeg cannot decode"))
        return self.video

    def clip_times(self, ticks: Iterable[int], stream: Stream) -> NDArray[np.float64]:
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
            kinds = ", ".join(s.type for s in container.streams) or "none"
            raise MediaError(
                explain(f"{path} has neither video nor audio", expected="a video file", got=f"streams: {kinds}")
            )
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
        return av.open(
            f"file:{path}",
            options={"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
        )
    except (FFmpegError, ValueError, OverflowError) as error:  # PyAV raises the last two for invalid headers
        raise MediaError(
            explain(
                f"{path} cannot be opened as a media file ({getattr(error, 'strerror', None) or error})",
                expected="a video file that FFmpeg can read",
                got=f"{path.stat().st_size} bytes of another format, or a file truncated before its index",
                remedy="Copy or download the file again, or check that it is a media file",
            )
        ) from error


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
            raise MediaError(
                explain(
                    f"{media.path} contains more packets than its size allows",
                    expected=f"at most {MAX_PACKETS} packets, of no more bytes than the file has",
                    got="an index that repeats bytes, or a wrong count",
                    remedy="The file is damaged or malicious; remove it from the data set",
                )
            )
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
