"""A few small pictures of a clip, for people who look at a check: face crops where it has them, else video frames."""

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
PICTURES = 4  # of a clip
PLACES = (0.05, 0.35, 0.65, 0.95)  # of the clip's length, where frames of a video are looked at
_MICROSECONDS = 1_000_000


Seen = tuple[Clip, float | None]  # as the arguments of `thumbnails`


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG file and what it shows."""

    caption: str
    jpeg: bytes


def all_thumbnails(chosen: Sequence[Seen]) -> Iterator[tuple[str, tuple[Thumbnail, ...]]]:
    """(clip id, its pictures) of every clip, made in decoding processes; none of a clip that one of them dies of."""
    for number, found in each(_thumbnails, chosen):
        yield chosen[number][0].id, () if isinstance(found, Failed) else found


def _thumbnails(seen: Seen) -> tuple[Thumbnail, ...]:
    return thumbnails(*seen)


def thumbnails(clip: Clip, duration: float | None) -> tuple[Thumbnail, ...]:
    """At most four pictures of a clip; what cannot be read is left out, never an error.

    Args:
        clip: the clip.
        duration: seconds; None where its video cannot be used, which is then not opened.
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
    for path in some(list(paths.values()), PICTURES):
        try:
            yield Thumbnail(f"{kind} {path.name}", _small(read_crop(path)[1]))
        except MediaError:
            continue


def _peek(path: Path, duration: float) -> Iterator[Thumbnail]:
    """The keyframes before a few places of the video: no other frame needs to be decoded."""
    seen = set()
    for place in PLACES:
        with opened(path) as media:  # each time anew: a decoder is not to be moved once it runs
            stream = media.need_video()
            media.container.seek(round((place * duration + media.start) * _MICROSECONDS))
            frame = next(decode(media, stream), None)
            if frame is None or frame.pts is None or frame.pts in seen:
                continue
            seen.add(frame.pts)
            (time,) = media.clip_times([frame.pts], stream)
            yield Thumbnail(f"frame at {max(time, 0.0):.1f} s", _small(to_rgb(frame, media.pixel_aspect)))


def _small(image: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    target = BytesIO()
    picture.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()
