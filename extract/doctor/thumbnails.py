"""Small images of a clip for the page of a check: face crops if it has them, else video frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image

from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError
from vaflow.extract.container import decode, opened
from vaflow.extract.doctor.facts import some
from vaflow.extract.image_folders import list_crops, list_stills, read_crop
from vaflow.extract.messages import Failed
from vaflow.extract.pool import each
from vaflow.extract.video import to_rgb

SIDE = 112  # pixels of the longer edge
QUALITY = 80
IMAGES = 4  # of a clip
PLACES = (0.05, 0.35, 0.65, 0.95)  # of the duration: times of the frames of a video
_MICROSECONDS = 1_000_000


ClipDuration = tuple[Clip, float | None]  # arguments of `thumbnails`


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG file and its caption."""

    caption: str
    jpeg: bytes


def all_thumbnails(chosen: Sequence[ClipDuration]) -> Iterator[tuple[str, tuple[Thumbnail, ...]]]:
    """(clip id, its images) of every clip, made in decoding processes; no images if FFmpeg crashes."""
    for number, images in each(_thumbnails, chosen):
        yield chosen[number][0].id, () if isinstance(images, Failed) else images


def _thumbnails(arguments: ClipDuration) -> tuple[Thumbnail, ...]:
    return thumbnails(*arguments)


def thumbnails(clip: Clip, duration: float | None) -> tuple[Thumbnail, ...]:
    """At most four images of a clip; files that cannot be read are skipped.

    Args:
        clip: the clip.
        duration: seconds; None if its video cannot be used, which is then not opened.
    """
    try:
        if clip.crops:
            return tuple(_files(list_crops(clip.crops), "crop"))
        if clip.frames is not None:
            return tuple(_files(list_stills(clip.frames), "frame"))
        return () if clip.video is None or duration is None else tuple(_peek(clip.video, duration))
    except (MediaError, OSError, FFmpegError):
        return ()


def _files(paths: dict[int, Path], kind: str) -> Iterator[Thumbnail]:
    for path in some(list(paths.values()), IMAGES):
        try:
            yield Thumbnail(f"{kind} {path.name}", _small(read_crop(path)[1]))
        except MediaError:
            continue


def _peek(path: Path, duration: float) -> Iterator[Thumbnail]:
    """The keyframes before a few times of the video, because other frames require more decoding."""
    used_frames = set()
    for share in PLACES:
        with opened(path) as media:  # opened again each time: a decoder must not seek once it runs
            stream = media.need_video()
            media.container.seek(round((share * duration + media.start) * _MICROSECONDS))
            frame = next(decode(media, stream), None)
            if frame is None or frame.pts is None or frame.pts in used_frames:
                continue
            used_frames.add(frame.pts)
            (time,) = media.clip_times([frame.pts], stream)
            yield Thumbnail(f"frame at {max(time, 0.0):.1f} s", _small(to_rgb(frame, media.pixel_aspect)))


def _small(image: NDArray[np.uint8]) -> bytes:
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    target = BytesIO()
    small.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()
