"""Opening media files: the only module that calls FFmpeg's demuxers and translates their errors."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import BinaryIO

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
_PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})  # texts that name other files
_REPEATS, _SPARE = 4, 2**20  # times that a file's bytes may come out (edit lists repeat some), and bytes beyond
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


SQUARE = Fraction(1)  # pixel aspect


@dataclass(frozen=True)
class Opened:
    """An open file, its best video and audio streams (cover images are not video), and its clock.

    Attributes:
        pixel_aspect: width / height of a stored pixel of the video, as the container or else the codec says.
        start: seconds, the container's start time; the clip clock counts from here.
        duration: seconds that the container promises for the whole file, or None.
    """

    path: Path
    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    start: float
    duration: float | None
    pixel_aspect: Fraction = SQUARE

    def need_video(self) -> VideoStream:
        """The video stream.

        Raises:
            MediaError: there is none, or no decoder for it.
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
            raise MediaError(explain(f"{self.path} has a video stream that this FFmpeg has no decoder for"))
        return self.video

    def clip_times(self, ticks: Iterable[int], stream: Stream) -> NDArray[np.float64]:
        """Ticks of a stream -> [N] seconds on the clip clock."""
        base = stream.time_base or Fraction(1, _MICROSECONDS)
        return np.fromiter((seconds(tick, base) for tick in ticks), np.float64) - self.start

    def stream_duration(self, stream: Stream) -> float | None:
        """Seconds that the container promises for one stream, or None. Matroska keeps them in a tag."""
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return _tag_seconds(stream.metadata.get("DURATION", ""))


def _tag_seconds(text: str) -> float | None:
    """ "00:01:02.500000000" -> 62.5; None for anything else."""
    parts = text.split(":")
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
            video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
        pixel_aspect = SQUARE
        if isinstance(video, VideoStream):
            aspect = video.sample_aspect_ratio
            pixel_aspect = aspect if aspect is not None and aspect > 0 else SQUARE  # 0: unknown
            if video.codec_context is not None:
                _check_size(path, *display_size(video.codec_context.width, video.codec_context.height, pixel_aspect))
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
        # "file:" because FFmpeg reads "12:30.mp4" as a protocol; the whitelist because a text file may be a playlist
        # that names hosts or other files.
        return av.open(
            f"file:{path}",
            options={"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
        )
    except (FFmpegError, ValueError, OverflowError) as error:  # PyAV raises the last two for absurd headers
        raise MediaError(
            explain(
                f"{path} cannot be opened as a media file ({getattr(error, 'strerror', None) or error})",
                expected="a video file that FFmpeg can read",
                got=f"{path.stat().st_size} bytes of another kind, or a file cut off before its index",
                remedy="Copy or download the file again, or check that it is a media file",
            )
        ) from error


def display_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """(width, height) in square pixels: the stored size, enlarged in one direction."""
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        got = f"{width} x {height}"
        problem = f"{path} claims frames that are too large"
        raise MediaError(explain(problem, expected=f"at most {MAX_PIXELS} pixels (8192 x 8192)", got=got))


def read_packets(media: Opened, streams: Sequence[Stream]) -> Iterator[Packet]:
    """Packets in file order, up to the end or the first place where the file cannot be read any further.

    Raises:
        MediaError: there are more of them than a file of this size can hold.
    """
    packets = media.container.demux(*streams)
    most = _REPEATS * media.path.stat().st_size + _SPARE
    for number in count():
        beat()
        try:
            packet = next(packets, None)
        except FFmpegError:
            return
        if packet is None or (packet.size == 0 and packet.dts is None):  # PyAV ends with an empty, flushing packet
            return
        most -= packet.size
        if most < 0 or number >= MAX_PACKETS:
            raise MediaError(
                explain(
                    f"{media.path} contains more packets than its size allows",
                    expected=f"at most {MAX_PACKETS} packets, of no more bytes than the file has",
                    got="an index that repeats the same bytes, or a wrong count",
                    remedy="The file is damaged or malicious; remove it from the data set",
                )
            )
        if packet.size:
            yield packet


def decode(media: Opened, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame that decoding shows, on one thread. Packets that do not decode are left out, as players do."""
    stream.codec_context.thread_count = 1
    for packet in read_packets(media, [stream]):
        yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def decode_packet(stream: VideoStream, packet: Packet | None) -> list[VideoFrame]:
    """The frames that a packet completes; None flushes the decoder. Empty where the packet is damaged."""
    try:
        return stream.decode(packet)
    except FFmpegError:
        return []


def seconds(timestamp: int, time_base: Fraction) -> float:
    """Ticks -> seconds, rounded once, so that equal ticks give equal numbers everywhere."""
    return timestamp * time_base.numerator / time_base.denominator


def promised_size(path: Path) -> int | None:
    """Size of the file according to the container's outermost boxes, or None where they have no size (live recordings).

    MP4 and MOV: the chain of boxes. Matroska and WebM: the segment's size. AVI: the chain of RIFF chunks.
    """
    with path.open("rb") as file:
        head = file.read(12)
        size = path.stat().st_size
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
            return _chain(file, size, _mp4_box)
        if head[:4] == b"RIFF":
            return _chain(file, size, _riff_chunk)
        if head[:4] == _EBML:
            return _matroska_end(file)
    return None


def _chain(file: BinaryIO, size: int, length_of: Callable[[bytes], int | None]) -> int | None:
    position = 0
    while position < size:
        file.seek(position)
        length = length_of(file.read(16))
        if length is None:
            return None if position == 0 else position
        position += length
    return position


def _mp4_box(head: bytes) -> int | None:
    if len(head) < 8:
        return None
    (length,) = struct.unpack(">I", head[:4])
    if length == 1 and len(head) == 16:
        (length,) = struct.unpack(">Q", head[8:16])
    return length if length >= 8 else None  # 0: up to the end of the file


def _riff_chunk(head: bytes) -> int | None:
    if len(head) < 8 or head[:4] != b"RIFF":
        return None
    (length,) = struct.unpack("<I", head[4:8])
    return 8 + length + length % 2


def _matroska_end(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _ebml_size(file)
    if header is None:
        return None
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return None
    length = _ebml_size(file)
    return None if length is None else file.tell() + length


def _ebml_size(file: BinaryIO) -> int | None:
    """Matroska's variable-length integer: leading zero bits of the first byte count the bytes that follow."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more))
    return None if value == (1 << 7 * (more + 1)) - 1 else value  # all ones: unknown
