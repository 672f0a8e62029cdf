"""Media files -> numbered, timed RGB frames as a player shows them: rotated, square pixels, 8 bits per channel.

Times are presentation times, in seconds on the *clip clock*: pts * time_base - the container's start time, FFmpeg's
own convention; never index / fps. Frame k is the k-th frame that decoding shows, in order of presentation.

`--decoder nvdec` decodes on a GPU through torchcodec (experimental: never run on a GPU). Frame times, and so the choice
of frames, come from PyAV. Colours are converted by other code than FFmpeg's, so pixels differ a little: streams have
another fingerprint, and the first clip is compared with PyAV.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from vaflow.errors import MediaError, UsageError, VaflowError, explain
from vaflow.extract.container import SQUARE, Opened, decode, display_size, frame_times, is_counted, opened
from vaflow.process import beat
from vaflow.timeline import Floats, Ints

logger = logging.getLogger(__name__)
Image = NDArray[np.uint8]

# Display matrices of 0, 90, 180 and 270 degrees counterclockwise.
_QUARTER_TURNS = np.array(
    [
        [1, 0, 0, 0, 1, 0, 0, 0, 1],
        [0, -1, 0, 1, 0, 0, 0, 0, 1],
        [-1, 0, 0, 0, -1, 0, 0, 0, 1],
        [0, 1, 0, -1, 0, 0, 0, 0, 1],
    ],
    np.int32,
)

# Version of reading times, frames and audio; incremented when any of it changes.
# 2: frames are scaled to square pixels; files with decreasing times are rejected.
# 3: the last audio step is valid if half of its part within the clip has audio.
READING = 3
_HOLD = 0.2  # seconds for which a neighbouring frame replaces one that cannot be decoded
_SAME = 2e-6  # seconds: presentation times closer than this are equal (container starts are rounded to microseconds)
JOINABLE = ("mpegts", "mpeg")  # containers whose files can be joined byte by byte
TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics (ITU-T H.273) that need tone mapping, which is not done

# Exact arithmetic: without these flags swscale uses approximations that depend on the processor and on odd widths.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT

AT_ONCE = 8  # frames that NVDEC decodes at once
COMPARED = 8  # of its frames that are compared with PyAV: the first of a clip
# Grey levels of 255, on average over all pixels and channels. On three real clips two settings of FFmpeg's own
# conversion differ by 1.3 to 1.7, a wrong colour matrix by 1.6 to 2.2 (so it is not told apart), a wrong range by 7.6
# and more. The difference of NVDEC has not been measured.
TOLERANCE = 3.0
_LATE = 1e-5  # seconds added to a frame's time, so that rounding does not select the one before
_SAME_ON_GPU = 1e-4  # seconds by which requested and returned times may differ


def to_rgb(frame: VideoFrame, pixel_aspect: Fraction = SQUARE) -> Image:
    """Convert a frame of any pixel format, depth, colour matrix and range to RGB [H, W, 3] uint8, rotated for display.

    Args:
        pixel_aspect: width / height of a stored pixel; frames are enlarged in one direction to square pixels.
    """
    width, height = display_size(frame.width, frame.height, pixel_aspect)
    scaled = frame.reformat(width, height, "rgb24", interpolation=_EXACT, threads=1)
    rgb = np.asarray(scaled.to_ndarray(), np.uint8)
    matrix = _display_matrix(frame)
    return rgb if matrix is None else np.ascontiguousarray(turned(rgb, matrix))


def _display_matrix(frame: VideoFrame) -> NDArray[np.int32] | None:
    try:
        data = cast(SideDataContainer, frame.side_data).get("DISPLAYMATRIX")
    except ValueError:  # PyAV raises for frames with an unknown kind of side data
        quarter = round(frame.rotation / 90) % 4
        return _QUARTER_TURNS[quarter] if quarter else None
    return None if data is None else np.frombuffer(bytes(data), np.int32)


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


@dataclass(frozen=True)
class VideoInfo:
    """The video stream as the container describes it.

    Attributes:
        width, height: pixels, as displayed (rotated, square pixels).
        codec: FFmpeg's name.
        nominal_rate: frames per second according to the stream, or None.
        average_rate: frames / duration, or None; differs from the nominal rate if the frame rate varies.
        frames: number of frames according to the container, 0 if unknown.
        duration: seconds according to the container, or None.
        rotation: degrees counter-clockwise by which stored frames are turned for display. `frames_at` turns them.
        pixel_aspect: width / height of a stored pixel. `frames_at` scales to square pixels.
        transfer: "PQ" or "HLG" for high dynamic range video, which is read without tone mapping; else "".
    """

    width: int
    height: int
    codec: str
    nominal_rate: float | None
    average_rate: float | None
    frames: int
    duration: float | None
    rotation: int
    pixel_aspect: Fraction = SQUARE
    transfer: str = ""


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
    """Contents of a media file. `start`: the container's start time in seconds; presentation times count from it."""

    path: Path
    container: str
    start: float
    video: VideoInfo | None
    audio: AudioInfo | None


def decoder_identity() -> dict[str, Any]:
    """Versions of the decoder: part of the fingerprint of everything made from decoded media."""
    return {
        "backend": "pyav",
        "version": av.__version__,
        "libavcodec": ".".join(str(part) for part in av.library_versions["libavcodec"]),
        "libswscale": ".".join(str(part) for part in av.library_versions["libswscale"]),
        "reading": READING,
    }


def probe(path: Path) -> MediaInfo:
    """Return the contents of a file, from its headers and its first frame.

    Raises:
        MediaError: the file is missing, empty, no media file, or has neither video nor audio.
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
    sides = display_size(context.width, context.height, media.pixel_aspect)
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
        pixel_aspect=media.pixel_aspect,
        transfer=TRANSFERS.get(int(first.color_trc) if first is not None else 0, ""),
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


def frames_at(path: Path, numbers: Ints, times: Floats) -> Iterator[tuple[int, Image]]:
    """Yield the images of the requested frames, each once, in one forward pass with bounded memory.

    A frame that does not decode is replaced by the one before it (at the start: after it) if that is at most 0.2 s
    away, as in players.

    Args:
        numbers: [K] frame numbers, ascending and unique.
        times: [N] seconds, from `frame_times` of the same file.

    Yields:
        (frame number, RGB image [H, W, 3] uint8 as displayed: rotated, square pixels, 8 bits per channel).

    Raises:
        ValueError: `numbers` does not ascend or leaves 0 .. N - 1.
        MediaError: no video stream, or decoding ends before the last requested frame.
    """
    numbers = np.asarray(numbers, np.int64)
    if numbers.size and ((np.diff(numbers) <= 0).any() or numbers[0] < 0 or numbers[-1] >= len(times)):
        raise ValueError(f"frames_at: numbers must ascend within 0 .. {len(times) - 1}")
    if not numbers.size:
        return
    with opened(path) as media:
        media.need_video()
        queue = numbers.tolist()
        position, shown = 0, None  # shown: number and frame that the decoder returned last
        for number, frame in _numbered(media, times):
            while position < len(queue) and queue[position] <= number:
                stand_in = _stand_in(path, queue[position], (number, frame), shown, times)
                yield queue[position], to_rgb(stand_in, media.pixel_aspect)
                position += 1
            if position == len(queue):
                return
            shown = (number, frame)
        for number in queue[position:]:
            yield number, to_rgb(_stand_in(path, number, None, shown, times), media.pixel_aspect)


_Shown = tuple[int, VideoFrame]


def _stand_in(path: Path, number: int, now: _Shown | None, before: _Shown | None, times: Floats) -> VideoFrame:
    """Return the frame of that number or, if it did not decode, the one before or after it if it is near."""
    if now is not None and now[0] == number:
        return now[1]
    for candidate in (before, now):
        if candidate is not None and abs(times[candidate[0]] - times[number]) <= _HOLD:
            return candidate[1]
    last = f"the last frame before it is number {before[0]} at {times[before[0]]:.2f} s" if before else "nothing"
    problem = f"{path} cannot be decoded at frame {number} ({times[number]:.2f} s)"
    remedy = "The file is damaged there; copy it again or remove the clip"
    raise MediaError(explain(problem, expected=f"{len(times)} frames up to {times[-1]:.2f} s", got=last, remedy=remedy))


def _numbered(media: Opened, times: Floats) -> Iterator[_Shown]:
    """Yield decoded frames with their numbers: by presentation time, or counted if the container has no times."""
    stream = media.need_video()
    if is_counted(media):
        yield from enumerate(decode(media, stream))
        return
    last, repeats = -np.inf, 0
    for frame in decode(media, stream):
        if frame.pts is None:
            continue
        (time,) = media.clip_times([frame.pts], stream)  # not frame.time_base, which PyAV loses when it flushes
        repeats = repeats + 1 if time == last else 0  # damaged files have two frames with one time
        last = time
        number = int(np.searchsorted(times, time - _SAME)) + repeats
        if number < len(times) and abs(times[number] - time) <= _SAME:
            yield number, frame


def misread_before(path: Path) -> tuple[str, ...]:
    """Return the kinds of streams that reading version 1 computed wrongly for this file; () if all were right.

    Raises:
        MediaError: the file cannot be opened.
    """
    with opened(path) as media:
        square, container = media.pixel_aspect == 1, media.container.format.name
    if container in JOINABLE:
        try:
            frame_times(path)
        except MediaError:
            return ("visual", "pixels", "audio", "logmel", "labels")
    return () if square else ("visual", "pixels")


def import_torchcodec() -> Any:
    """Import torchcodec with its decoders.

    Raises:
        UsageError: it is not installed, or does not find FFmpeg's libraries.
    """
    remedy = "Use --decoder pyav, or install FFmpeg's shared libraries and, in the clone: pip install -e '.[nvdec]'"
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        got = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(explain("--decoder nvdec needs torchcodec", got=got, remedy=remedy)) from error
    if torchcodec.ffmpeg_major_version is None:  # it can be imported without them, for images only
        raise UsageError(explain("torchcodec does not find FFmpeg's shared libraries", remedy=remedy))
    return torchcodec


def require_nvdec(device: str) -> None:
    """Check that NVDEC can be used, before the first clip.

    Raises:
        UsageError: torchcodec is missing, or `device` is not a GPU.
    """
    import_torchcodec()
    if not device.startswith("cuda"):
        remedy = "Use --decoder pyav, or run on a machine with an NVIDIA GPU"
        raise UsageError(explain("--decoder nvdec needs a GPU", expected="--device cuda", got=device, remedy=remedy))


def nvdec_identity() -> dict[str, Any]:
    """Identity of the frame decoder, for the fingerprint; the clock is PyAV's."""
    return {"backend": "torchcodec nvdec", "version": import_torchcodec().__version__, "clock": decoder_identity()}


def frames_on_gpu(path: Path, targets: Ints, times: Floats, device: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """As `frames_at`, decoded by the GPU `device`.

    Raises:
        MediaError: the GPU cannot decode this file, or returns another frame than the requested one.
    """
    if not len(targets):
        return
    with opened(path) as media:
        start, stream = media.start, media.need_video().index
        if media.pixel_aspect != 1:
            raise _undecodable(path, f"pixels that are not square ({media.pixel_aspect})")
    try:
        decoders = import_torchcodec().decoders
        with decoders.set_cuda_backend("beta"):  # NVDEC itself; later versions take the name for their default
            decoder = decoders.VideoDecoder(str(path), stream_index=stream, dimension_order="NHWC", device=device)
        if decoder.cpu_fallback:  # decoded on the CPU by code that the fingerprint does not name
            raise _undecodable(path, str(decoder.cpu_fallback))
        for begin in range(0, len(targets), AT_ONCE):
            numbers = np.asarray(targets[begin : begin + AT_ONCE], np.int64)
            requested = times[numbers]
            batch = decoder.get_frames_played_at(seconds=(requested + start + _LATE).tolist())
            returned = batch.pts_seconds.cpu().numpy() - start
            off = np.abs(returned - requested)
            if (off > _SAME_ON_GPU).any():
                worst = int(off.argmax())
                problem = f"the frame at {returned[worst]:.4f} s instead of the one at {requested[worst]:.4f} s"
                raise _undecodable(path, problem)
            yield from zip(numbers.tolist(), batch.data.cpu().numpy(), strict=True)
            beat()
    except MediaError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise _undecodable(path, str(error).strip().partition("\n")[0]) from error


def _undecodable(path: Path, got: str) -> MediaError:
    remedy = "Use --decoder pyav and a new cache: the fingerprint names the decoder"
    return MediaError(explain(f"{path} cannot be decoded by the GPU", got=got, remedy=remedy))


def check_parity(path: Path, device: str) -> float:
    """Mean difference, in grey levels, between NVDEC's and PyAV's first frames of a file; it is logged.

    Raises:
        VaflowError: it is above `TOLERANCE`: other frames, or other colours.
        MediaError: the file cannot be decoded.
    """
    times = frame_times(path)
    numbers = np.arange(min(COMPARED, len(times)))
    pairs = zip(frames_at(path, numbers, times), frames_on_gpu(path, numbers, times, device), strict=True)
    differences = [
        float(np.abs(one.astype(np.int16) - other).mean()) if one.shape == other.shape else float("inf")
        for (_, one), (_, other) in pairs
    ]
    mean = float(np.mean(differences))
    if not mean <= TOLERANCE:
        problem = f"NVDEC and PyAV decode different frames of {path}"
        expected = f"a mean difference of at most {TOLERANCE:g} grey levels over {len(numbers)} frames"
        raise VaflowError(explain(problem, expected=expected, got=f"{mean:.2f}", remedy="Use --decoder pyav"))
    logger.info("NVDEC and PyAV differ by %.2f grey levels on average (%d frames of %s)", mean, len(numbers), path.name)
    return mean
