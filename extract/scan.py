"""Frame times of a media file, by reading it once to its end, and whether it is as long as its container promises.

There are two kinds of containers. *Timed* ones (MP4, MOV, Matroska ...) store a presentation time with every packet:
reading packets suffices where every packet is one frame. Packets that decoding does not show (cut off by an edit list,
or before the first frame that can be decoded) are left out. *Counted* ones (AVI, raw streams) store no times; what
FFmpeg guesses is a frame late for H.264 and does not ascend with B-frames. There everything is decoded, and the k-th
frame shown takes the k-th decoding time, which is when the file's writer meant it to be shown.
"""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import NoReturn

import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from vaflow.errors import MediaError, explain
from vaflow.extract.config import check_span
from vaflow.extract.container import Opened, decode_packet, opened, promised_size, read_packets, seconds
from vaflow.timeline import median_interval

Floats = NDArray[np.float64]

# Codecs of which every packet is one shown frame. Others have packets that show nothing (VP8's invisible frames,
# MPEG-4's empty ones), so they are decoded.
_PACKET_IS_FRAME = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg"})
_COUNTED = frozenset({"avi", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu"})  # FFmpeg's names of the containers
_SLACK_FRAMES = 2  # frames that may be missing at the end of a good file
_SLACK_SECONDS = 0.25  # the same where the container promises only a duration
_BACKWARD = 0.1  # seconds by which decoding times may go back; ffmpeg calls more than that a discontinuity
AUDIO_ROWS = 25  # rows per second of the clock of a clip that has no video


@dataclass
class _Scan:
    """State of reading a file: ticks of the video stream, and the end of all streams in clip seconds."""

    pts: "array[int]" = field(default_factory=lambda: array("q"))  # 64 bits each: hours of frames in a few megabytes
    dts: "array[int]" = field(default_factory=lambda: array("q"))
    packets: int = 0  # whole packets of video
    decoded: int = 0  # decoded frames
    first: int | None = None  # presentation time of the first frame that decodes
    untimed: bool = False  # a packet that should have a presentation time has none
    backward: tuple[float, float] | None = None  # seconds, where decoding times first go back: from, to
    end: float = 0.0


def is_counted(media: Opened) -> bool:
    """Whether frames are numbered by counting, because the container has no presentation times."""
    return media.container.format.name in _COUNTED


def scan_times(path: Path) -> Floats:
    """Presentation time of every frame that decoding shows, [N] seconds on the clip clock, ascending, N >= 1.

    Raises:
        MediaError: no video stream, nothing decodes, or the file holds less than its container promises.
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
    for packet in read_packets(media, [media.container.streams[i] for i in _timed_streams(media)]):
        _see(scan, packet, media)
        if packet.stream_index != stream.index:
            continue
        if by_packet:
            _take_packet(scan, packet)
        if not by_packet or not scan.decoded:
            _take_frames(scan, decode_packet(stream, packet), by_packet)
    if not by_packet or not scan.decoded:
        _take_frames(scan, decode_packet(stream, None), by_packet)
    return scan


def _timed_streams(media: Opened) -> list[int]:
    """Streams that can reach up to the container's end."""
    return [s.index for s in media.container.streams if s.type in ("video", "audio", "subtitle")]


def _see(scan: _Scan, packet: Packet, media: Opened) -> None:
    if packet.pts is not None:
        scan.end = max(scan.end, seconds(packet.pts + (packet.duration or 0), packet.time_base) - media.start)
    if packet.stream_index == media.need_video().index and not packet.is_corrupt:
        scan.packets += 1
        if packet.dts is not None:
            if scan.dts and scan.backward is None:
                before, now = media.clip_times([scan.dts[-1], packet.dts], media.need_video())
                scan.backward = (before, now) if now < before - _BACKWARD else None
            scan.dts.append(packet.dts)


def _take_packet(scan: _Scan, packet: Packet) -> None:
    """One packet is one frame, unless it is discarded or cut short."""
    if packet.is_discard or packet.is_corrupt:
        return
    if packet.pts is None:
        scan.untimed = True
    else:
        scan.pts.append(packet.pts)


def _take_frames(scan: _Scan, frames: list[VideoFrame], by_packet: bool) -> None:
    """Decoded frames. The first one tells which earlier ones cannot be decoded (they refer to what was cut off)."""
    for frame in frames:
        scan.decoded += 1
        if frame.pts is None:
            continue
        if not by_packet:
            scan.pts.append(frame.pts)
        elif scan.decoded == 1:
            scan.first = frame.pts


def _checked_times(media: Opened, scan: _Scan) -> Floats:
    stream = media.need_video()
    if not scan.decoded:
        promised, there = _promised_frames(media, scan)
        raise MediaError(
            explain(
                f"No frame of {media.path} can be decoded",
                expected=f"{promised or 'some'} frames of {stream.codec_context.name} video",
                got=f"{there} whole packets; none of them decodes",
                remedy="The file is damaged or cut off; copy it again",
            )
        )
    if scan.backward is not None:
        before, now = scan.backward
        raise MediaError(
            explain(
                f"The times of {media.path} go back: two recordings were joined in one file",
                expected="times that ascend",
                got=f"{now:.2f} s after {before:.2f} s",
                remedy=f"Write them anew: ffmpeg -i {quote(str(media.path))} -c copy NEW.mkv",
            )
        )
    times = _counted_times(media, scan) if is_counted(media) else _stamped_times(media, scan)
    # The container's start is rounded to microseconds: the first frame may seem to lie a fraction of one away from it.
    times = np.where(np.abs(times) < 1e-6, 0.0, times)
    check_span(media.path, times)
    _check_whole(media, scan, times)
    return times


def _stamped_times(media: Opened, scan: _Scan) -> Floats:
    shown = sorted(tick for tick in scan.pts if scan.first is None or tick >= scan.first)
    return media.clip_times(shown, media.need_video())


def _counted_times(media: Opened, scan: _Scan) -> Floats:
    """The k-th frame at the k-th decoding time; at the frame rate where there are none (raw streams)."""
    stream = media.need_video()
    times = media.clip_times(sorted(scan.dts)[: scan.decoded], stream)
    step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
    after = times[-1] + step if times.size else 0.0
    return np.append(times, after + step * np.arange(scan.decoded - times.size))


def _check_whole(media: Opened, scan: _Scan, times: Floats) -> None:
    """Compare the file with what its container promises: frames by its index, else bytes, else seconds.

    Raises:
        MediaError: more than two frames (a quarter of a second, without an index) are missing.
    """
    promised, there = _promised_frames(media, scan)
    size, whole_size = media.path.stat().st_size, promised_size(media.path)
    bytes_missing = whole_size is not None and whole_size > size
    if promised:
        if promised - there > _SLACK_FRAMES:
            _raise_truncated(media, f"{promised} frames", f"{there} frames, up to {times[-1]:.2f} s")
        return
    if whole_size is not None and not bytes_missing:
        return
    step = median_interval(times)
    slack = _SLACK_FRAMES * step if bytes_missing else max(_SLACK_SECONDS, (_SLACK_FRAMES + 1) * step)
    lost = (media.duration or 0.0) - scan.end
    if lost > slack:
        _raise_truncated(media, f"{media.duration:.2f} s", f"{scan.end:.2f} s")
    if bytes_missing and "matroska" not in media.container.format.name:  # fragments promise nothing beyond themselves
        _raise_truncated(media, f"{whole_size} bytes", f"{size} bytes, frames up to {times[-1]:.2f} s")


def _promised_frames(media: Opened, scan: _Scan) -> tuple[int, int]:
    """Video packets that the index promises (0: there is no index), and those in the file."""
    stream = media.need_video()
    if "mov" in media.container.format.name and stream.frames:
        return len(stream.index_entries), scan.packets  # the index, unlike the count, respects edit lists
    if media.container.format.name == "avi":
        return stream.frames, max(scan.dts, default=-1) + 1  # one tick per frame; dropped frames have no packet
    return 0, scan.packets


def _raise_truncated(media: Opened, promised: str, there: str) -> NoReturn:
    raise MediaError(
        explain(
            f"{media.path} is truncated: it holds less than its container promises",
            expected=promised,
            got=there,
            remedy="Copy or download the file again",
        )
    )


def audio_clock(path: Path) -> Floats:
    """Row times [N] seconds of a clip that is audio only, N >= 1: `AUDIO_ROWS` a second, to the end of its audio.

    Raises:
        MediaError: no audio stream, no data in it, or the file holds less than its container promises.
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
            _raise_truncated(media, f"{promised} bytes", f"{path.stat().st_size} bytes")
        times = np.arange(max(1, int(end * AUDIO_ROWS))) / AUDIO_ROWS
        check_span(path, times)
        return times
