"""One decoded frame -> the RGB picture that a viewer would see.

Media files -> numbered, timed frames. Presentation times throughout: never index / fps.

Times are seconds on the *clip clock*: pts * time_base - the container's start time, FFmpeg's own convention. Frame k is
the k-th picture that decoding shows, in order of presentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from vaflow.errors import MediaError, explain
from vaflow.extract.container import Opened, decode, opened
from vaflow.extract.scan import is_counted, scan_times

Image = NDArray[np.uint8]

# Display matrices of 0, 90, 180 and 270 degrees counter-clockwise.
_QUARTER_TURNS = np.array(
    [
        [1, 0, 0, 0, 1, 0, 0, 0, 1],
        [0, -1, 0, 1, 0, 0, 0, 0, 1],
        [-1, 0, 0, 0, -1, 0, 0, 0, 1],
        [0, 1, 0, -1, 0, 0, 0, 0, 1],
    ],
    np.int32,
)

# Exact arithmetic: without these flags swscale takes shortcuts that depend on the processor and on odd widths.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT


def to_rgb(frame: VideoFrame) -> Image:
    """[H, W, 3] uint8 of any pixel format, depth, colour matrix and range, turned as the file's matrix says."""
    rgb = np.asarray(frame.reformat(format="rgb24", interpolation=_EXACT, threads=1).to_ndarray(), np.uint8)
    matrix = _display_matrix(frame)
    return rgb if matrix is None else np.ascontiguousarray(turned(rgb, matrix))


def _display_matrix(frame: VideoFrame) -> NDArray[np.int32] | None:
    try:
        found = cast(SideDataContainer, frame.side_data).get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives up on a frame that has any kind of side data it does not know
        quarter = round(frame.rotation / 90) % 4
        return _QUARTER_TURNS[quarter] if quarter else None
    return None if found is None else np.frombuffer(bytes(found), np.int32)


def turned(image: Image, matrix: NDArray[np.int32]) -> Image:
    """Apply a display matrix's quarter turns and mirrorings.

    Args:
        image: [H, W, 3].
        matrix: [9], row by row; a stored point (x, y) is shown at (x, y) @ [[m0, m1], [m3, m4]].
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.swapaxes(0, 1)
        across, down = c, b
    if across < 0:
        image = image[:, ::-1]
    return image[::-1] if down < 0 else image


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

READING = 1  # of times and sound by us; raised when anything changes in it, so that caches made before are noticed
_HOLD = 0.2  # seconds that a neighbouring picture stands in for one that cannot be decoded
_SAME = 2e-6  # seconds: two presentation times that are one (the container's start is rounded to microseconds)


@dataclass(frozen=True)
class VideoInfo:
    """The video stream as the container describes it.

    Attributes:
        width, height: pixels, as displayed (after rotation).
        codec: FFmpeg's name.
        nominal_rate: frames per second that the stream claims, or None.
        average_rate: frames by duration, or None; unlike the nominal rate where the frame rate varies.
        frames: the container's count, 0 where it has none.
        duration: seconds that the container promises, or None.
        rotation: degrees counter-clockwise that stored pictures are turned for display. `frames_at` turns them.
    """

    width: int
    height: int
    codec: str
    nominal_rate: float | None
    average_rate: float | None
    frames: int
    duration: float | None
    rotation: int


@dataclass(frozen=True)
class AudioInfo:
    """The audio stream: codec, samples per second, channels, and its place on the clip clock in seconds."""

    codec: str
    rate: int
    channels: int
    start: float
    duration: float | None


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds. `start` is the container's start time in seconds, subtracted from all presentation times."""

    path: Path
    container: str
    start: float
    video: VideoInfo | None
    audio: AudioInfo | None


def decoder_identity() -> dict[str, Any]:
    """What decodes: part of the fingerprint of everything made from decoded media."""
    return {
        "backend": "pyav",
        "version": av.__version__,
        "libavcodec": ".".join(str(part) for part in av.library_versions["libavcodec"]),
        "libswscale": ".".join(str(part) for part in av.library_versions["libswscale"]),
        "reading": READING,
    }


def probe(path: Path) -> MediaInfo:
    """What is in a file, from its headers and its first picture.

    Raises:
        MediaError: the file is missing, empty, no media file, or holds neither picture nor sound.
    """
    with opened(path) as media:
        return MediaInfo(
            path=Path(path),
            container=media.container.format.name,
            start=media.start,
            video=None if media.video is None else _video_info(media),
            audio=_audio_info(media),
        )


def _video_info(media: Opened) -> VideoInfo:
    stream = media.need_video()
    context = stream.codec_context
    first = next(decode(media, stream), None)
    rotation = first.rotation if first is not None else 0
    sides = (context.width, context.height)
    width, height = sides[::-1] if round(rotation / 90) % 2 else sides
    return VideoInfo(
        width=width,
        height=height,
        codec=context.name,
        nominal_rate=float(stream.base_rate) if stream.base_rate else None,
        average_rate=float(stream.average_rate) if stream.average_rate else None,
        frames=stream.frames,
        duration=media.stream_duration(stream) or media.duration,
        rotation=rotation,
    )


def _audio_info(media: Opened) -> AudioInfo | None:
    stream = media.audio
    if stream is None or stream.codec_context is None:
        return None
    start = 0.0
    if stream.start_time is not None:
        start = float(media.clip_times([stream.start_time], stream)[0])
    context = stream.codec_context
    return AudioInfo(context.name, context.sample_rate, context.channels, start, media.stream_duration(stream))


def frame_times(path: Path, *, info: MediaInfo | None = None) -> Floats:
    """Presentation time of every frame that decoding shows, [N] seconds on the clip clock, ascending, N >= 1.

    Args:
        path: a file with a video stream.
        info: what `probe` said about it, if it was asked already: a file without video then need not be opened.

    Raises:
        MediaError: no video stream, nothing decodes, or the file holds less than its container promises (truncated).
    """
    if info is not None and info.video is None:
        raise MediaError(explain(f"{path} has no video stream", expected="a file with moving pictures"))
    return scan_times(Path(path))


def frames_at(path: Path, wanted: Ints, times: Floats) -> Iterator[tuple[int, Image]]:
    """The pictures of the wanted frames, each once, in one forward pass with bounded memory.

    A picture that is damaged and not shown is replaced by the one before it (at the start: after it) if that lies at
    most 0.2 s away, as a player would show it.

    Args:
        path: a file with a video stream.
        wanted: [K] frame numbers, ascending and unique.
        times: [N] seconds, from `frame_times` of the same file.

    Yields:
        (frame number, RGB picture [H, W, 3] uint8 as displayed: rotated, 8 bits per channel).

    Raises:
        ValueError: `wanted` does not ascend or leaves 0 .. N - 1.
        MediaError: no video stream, or decoding ends before the last wanted frame.
    """
    wanted = np.asarray(wanted, np.int64)
    if wanted.size and ((np.diff(wanted) <= 0).any() or wanted[0] < 0 or wanted[-1] >= len(times)):
        raise ValueError(f"frames_at: wanted must ascend within 0 .. {len(times) - 1}")
    if not wanted.size:
        return
    with opened(path) as media:
        media.need_video()
        queue = wanted.tolist()
        position, shown = 0, None  # shown: number and frame of the last picture that came out of the decoder
        for number, frame in _numbered(media, times):
            while position < len(queue) and queue[position] <= number:
                stand_in = _stand_in(path, queue[position], (number, frame), shown, times)
                yield queue[position], to_rgb(stand_in)
                position += 1
            if position == len(queue):
                return
            shown = (number, frame)
        for number in queue[position:]:
            yield number, to_rgb(_stand_in(path, number, None, shown, times))


_Shown = tuple[int, VideoFrame]


def _stand_in(path: Path, number: int, now: _Shown | None, before: _Shown | None, times: Floats) -> VideoFrame:
    """The frame of that number or, where decoding did not show it, the one before or after it if it is near."""
    if now is not None and now[0] == number:
        return now[1]
    for candidate in (before, now):
        if candidate is not None and abs(times[candidate[0]] - times[number]) <= _HOLD:
            return candidate[1]
    last = f"the last picture before it is frame {before[0]} at {times[before[0]]:.2f} s" if before else "nothing"
    raise MediaError(
        explain(
            f"{path} cannot be decoded at frame {number} ({times[number]:.2f} s)",
            expected=f"{len(times)} pictures up to {times[-1]:.2f} s",
            got=last,
            remedy="The file is damaged there; copy it again or leave the clip out",
        )
    )


def _numbered(media: Opened, times: Floats) -> Iterator[_Shown]:
    """Decoded frames with their numbers: by presentation time, or by counting where the container has no times."""
    stream = media.need_video()
    if is_counted(media):
        yield from enumerate(decode(media, stream))
        return
    last, repeats = -np.inf, 0
    for frame in decode(media, stream):
        if frame.pts is None:
            continue
        (time,) = media.clip_times([frame.pts], stream)  # not frame.time_base: PyAV forgets it when it flushes
        repeats = repeats + 1 if time == last else 0  # broken files show two pictures at one time
        last = time
        number = int(np.searchsorted(times, time - _SAME)) + repeats
        if number < len(times) and abs(times[number] - time) <= _SAME:
            yield number, frame
