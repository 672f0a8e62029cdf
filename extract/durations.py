"""Durations of clips, from their containers' headers: used to balance shards and to start with the longest clip.

A wrong duration costs balance only, so nothing is decoded and FFmpeg is not called: a broken file cannot crash the
process that plans, and 100,000 headers are read in seconds.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import BinaryIO, TypeVar

from vaflow.datasets.clip import Clip

Item = TypeVar("Item")
Result = TypeVar("Result")

READERS = 16  # threads: on a network disk, waiting is what it takes
_AT_A_TIME = 64  # files per thread: handing over one takes longer than reading a header that is in memory
_BYTES_PER_SECOND = 100_000  # assumed where no header of the data set has a duration
_HEAD = 1 << 16  # bytes of a Matroska file in which its duration is searched
_BOXES = 1000  # stop after this many MP4 boxes


def lengths(clips: Iterable[Clip]) -> dict[str, float]:
    """Item id -> seconds.

    A file whose header has no duration is taken to be as long as its size suggests, at the rate of the others. Clips
    without a file count 0; folders of frames count their images at their rate.
    """
    clips = list(clips)
    media = {clip.id: clip.video or (None if clip.frames else clip.audio) for clip in clips}
    files = list(dict.fromkeys(path for path in media.values() if path is not None))
    of_file = dict(zip(files, _fill_in(side_by_side(_size_and_seconds, files)), strict=True))
    return {clip.id: _still_seconds(clip) if (path := media[clip.id]) is None else of_file[path] for clip in clips}


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, in their order, computed by threads: most of the time is waiting for a disk."""
    parts = [items[first : first + _AT_A_TIME] for first in range(0, len(items), _AT_A_TIME)]
    with ThreadPoolExecutor(READERS, "vaflow-lengths") as pool:
        return [result for part in pool.map(lambda part: [function(item) for item in part], parts) for result in part]


def header_seconds(path: Path) -> float | None:
    """Duration in a container's header, in seconds; None if it has none, or the file is no container.

    MP4 and MOV: the movie header. Matroska and WebM: the segment's information. AVI: the main header.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
            reader = next((read for found, read in _FORMATS if found(head)), None)
            seconds = reader(file) if reader is not None else None
    except (OSError, struct.error, IndexError, ZeroDivisionError):  # cut off, or no such thing
        return None
    return seconds if seconds is not None and 0 < seconds < 1e9 else None


def _size_and_seconds(path: Path) -> tuple[int, float | None]:
    if not path.is_file():  # gone, or a pipe that nobody writes into
        return 0, None
    try:
        return path.stat().st_size, header_seconds(path)
    except OSError:
        return 0, None


def _fill_in(found: list[tuple[int, float | None]]) -> list[float]:
    rates = [size / seconds for size, seconds in found if seconds]
    rate = median(rates) if rates else _BYTES_PER_SECOND
    return [seconds if seconds else size / rate for size, seconds in found]


def _still_seconds(clip: Clip) -> float:
    if clip.frames is None or not clip.frame_rate:
        return 0.0
    try:
        return sum(1 for _ in clip.frames.iterdir()) / clip.frame_rate
    except OSError:
        return 0.0


def _mp4(file: BinaryIO) -> float | None:
    """moov / mvhd: ticks per second, ticks."""
    moov = _box(file, 0, b"moov")
    start = _box(file, moov, b"mvhd") if moov is not None else None
    if start is None:
        return None
    file.seek(start)
    version = file.read(4)[0]
    rate, ticks = struct.unpack(">16xIQ" if version == 1 else ">8xII", file.read(28 if version == 1 else 16))
    return float(ticks / rate)


def _box(file: BinaryIO, position: int, name: bytes) -> int | None:
    """Where the content of the next box of that name begins."""
    for _ in range(_BOXES):
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if length == 1:
            (length,), header = struct.unpack(">Q", file.read(8)), 16
        if kind == name:
            return position + header
        if length < header:  # 0: up to the end of the file
            return None
        position += length
    return None


def _avi(file: BinaryIO) -> float | None:
    """RIFF / hdrl / avih: microseconds per frame, frames."""
    file.seek(24)
    if file.read(4) != b"avih":
        return None
    interval, frames = struct.unpack("<4xI12xI", file.read(24))
    return float(interval * frames / 1e6)


def _matroska(file: BinaryIO) -> float | None:
    """Segment / Info: nanoseconds per tick (default: one million), ticks as a float."""
    file.seek(0)
    head = file.read(_HEAD)
    begin = head.find(b"\x15\x49\xa9\x66")
    info = head[begin + 4 : begin + 260] if begin >= 0 else b""
    scale_at, ticks_at = info.find(b"\x2a\xd7\xb1"), info.find(b"\x44\x89")
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


_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO], float | None]], ...] = (
    (lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"), _mp4),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _avi),
    (lambda head: head[:4] == b"\x1a\x45\xdf\xa3", _matroska),
)
