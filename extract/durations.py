"""Durations and sizes in the headers of media files, and the durations of clips, without FFmpeg.

Durations balance shards and order clips; a wrong one costs balance only. Nothing is decoded, so that a damaged file
cannot crash the process that plans, and 100,000 headers are read in seconds.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import BinaryIO, Literal, TypeVar

from vaflow.datasets.clip import Clip

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 16  # threads: on a network disk, most of the time is spent waiting
_BATCH = 64  # files per submission: submitting one costs more than reading a cached header
_BYTES_PER_SECOND = 100_000  # assumed if no header of the data set has a duration
_HEAD = 1 << 16  # bytes of a Matroska file in which its duration is searched
_BOXES = 1000  # stop after this many MP4 boxes
_EBML, _SEGMENT, _INFO = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x15\x49\xa9\x66"
_SCALE, _DURATION = b"\x2a\xd7\xb1", b"\x44\x89"


def lengths(clips: Iterable[Clip]) -> dict[str, float]:
    """Return item id -> seconds.

    For a file whose header has no duration, it is estimated from its size and the median byte rate of the others. Clips
    without a file count 0; folders of frames count their images at their frame rate.
    """
    clips = list(clips)
    media = {clip.id: clip.video or (None if clip.frames else clip.audio) for clip in clips}
    files = list(dict.fromkeys(path for path in media.values() if path is not None))
    known = side_by_side(_size_and_seconds, files)
    rates = [size / seconds for size, seconds in known if seconds]
    rate = median(rates) if rates else _BYTES_PER_SECOND
    of_file = {path: seconds or size / rate for path, (size, seconds) in zip(files, known, strict=True)}
    result = {}
    for clip in clips:
        path, seconds = media[clip.id], 0.0
        if path is not None:
            seconds = of_file[path]
        elif clip.frames is not None and clip.frame_rate:
            with suppress(OSError):
                seconds = sum(1 for _ in clip.frames.iterdir()) / clip.frame_rate
        result[clip.id] = seconds
    return result


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `function` of each item, in order, computed by threads: most of the time is spent waiting for a disk."""
    batches = [items[first : first + _BATCH] for first in range(0, len(items), _BATCH)]
    with ThreadPoolExecutor(READERS, "vaflow-lengths") as pool:
        return [result for batch in pool.map(lambda batch: [function(i) for i in batch], batches) for result in batch]


def _size_and_seconds(path: Path) -> tuple[int, float | None]:
    if not path.is_file():  # missing, or a pipe without a writer
        return 0, None
    try:
        return path.stat().st_size, header_seconds(path)
    except OSError:
        return 0, None


def _container(head: bytes) -> Literal["mp4", "riff", "matroska", ""]:
    """Return the container of a file with these first 12 bytes; "" for any other."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
        return "mp4"
    if head[:4] == b"RIFF":
        return "riff"
    return "matroska" if head[:4] == _EBML else ""


def header_seconds(path: Path) -> float | None:
    """Return the duration in a container's header, in seconds; None if it has none, or the file is not a container.

    MP4 and MOV: the movie header. Matroska and WebM: the segment's information. AVI: the main header.
    """
    seconds: float | None = None
    try:
        with path.open("rb") as file:
            head = file.read(12)
            container = _container(head)
            if container == "mp4":
                seconds = _mp4_seconds(file)
            elif container == "matroska":
                seconds = _matroska_seconds(file)
            elif container == "riff" and head[8:12] == b"AVI ":  # RIFF / hdrl / avih: microseconds per frame, frames
                file.seek(24)
                if file.read(4) == b"avih":
                    interval, frames = struct.unpack("<4xI12xI", file.read(24))
                    seconds = interval * frames / 1e6
    except (OSError, struct.error, IndexError, ZeroDivisionError):  # truncated or invalid
        return None
    return seconds if seconds is not None and 0 < seconds < 1e9 else None


def _mp4_seconds(file: BinaryIO) -> float | None:
    """Read moov / mvhd: ticks per second, ticks."""
    moov = _find_box(file, 0, b"moov")
    start = _find_box(file, moov, b"mvhd") if moov is not None else None
    if start is None:
        return None
    file.seek(start)
    version = file.read(4)[0]
    rate, ticks = struct.unpack(">16xIQ" if version == 1 else ">8xII", file.read(28 if version == 1 else 16))
    return float(ticks / rate)


def _find_box(file: BinaryIO, position: int, name: bytes) -> int | None:
    """Return the offset of the content of the next MP4 box of that name."""
    for _ in range(_BOXES):
        file.seek(position)
        head = file.read(16)
        if head[4:8] == name:
            return position + (16 if head[:4] == b"\0\0\0\1" else 8)
        length = _box_length(head)
        if length is None:
            return None
        position += length
    return None


def _box_length(head: bytes) -> int | None:
    """Return the length of an MP4 box from its first 16 bytes; None if it extends to the end of the file."""
    if len(head) < 8:
        return None
    (length,) = struct.unpack(">I", head[:4])
    if length == 1 and len(head) == 16:
        (length,) = struct.unpack(">Q", head[8:16])
    return length if length >= 8 else None


def _matroska_seconds(file: BinaryIO) -> float | None:
    """Read Segment / Info: nanoseconds per tick (default: one million), ticks as a float."""
    file.seek(0)
    head = file.read(_HEAD)
    begin = head.find(_INFO)
    info = head[begin + 4 : begin + 260] if begin >= 0 else b""
    scale_at, ticks_at = info.find(_SCALE), info.find(_DURATION)
    if ticks_at < 0:
        return None
    width = info[ticks_at + 2] & 0x7F
    if width not in (4, 8):
        return None
    (ticks,) = struct.unpack_from(">f" if width == 4 else ">d", info, ticks_at + 3)
    scale = 1_000_000
    if scale_at >= 0:
        width_of_scale = info[scale_at + 3] & 0x7F
        scale = int.from_bytes(info[scale_at + 4 : scale_at + 4 + width_of_scale])
    return float(ticks * scale / 1e9)


def promised_size(path: Path) -> int | None:
    """Return the size of a file according to its container; None if unstated (live recordings).

    MP4 and MOV: the chain of boxes. Matroska and WebM: the segment's size. AVI: the chain of RIFF chunks.
    """
    with path.open("rb") as file:
        container, size = _container(file.read(12)), path.stat().st_size
        if container == "matroska":
            file.seek(4)
            header = _ebml_size(file)
            if header is None:
                return None
            file.seek(header, 1)
            length = _ebml_size(file) if file.read(4) == _SEGMENT else None
            return None if length is None else file.tell() + length
        position = 0
        while container and position < size:
            file.seek(position)
            head = file.read(16)
            if container == "mp4":
                length = _box_length(head)
            else:
                chunk = len(head) >= 8 and head[:4] == b"RIFF"
                length = 8 + (data := int.from_bytes(head[4:8], "little")) + data % 2 if chunk else None
            if length is None:
                break
            position += length
        return position or None


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a variable-length integer of Matroska; the leading zero bits of its first byte count the further bytes."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more))
    return None if value == (1 << 7 * (more + 1)) - 1 else value  # all ones: unknown
