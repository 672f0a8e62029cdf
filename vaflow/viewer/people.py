"""The page of `vaflow faces`: the people of clips, with crops over time; and all boxes as CSV.

Crops come from the cache, which holds them for clips with several people; those of other clips are cut from the videos,
if `--media` names their folder.
"""

import csv
import logging
import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Images
from tqdm import tqdm

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.cache.remote import shown_place
from vaflow.cache.schema import CROPS, FACES, LABELS, PIXELS
from vaflow.datasets import open_dataset
from vaflow.datasets.files import head
from vaflow.encoders.preprocessing import decode_image
from vaflow.errors import DataError, MediaError, UsageError, count, examples, explain
from vaflow.extract.container import frame_times
from vaflow.extract.faces.crops import MAX_YAW, MIN_CLEAR_SCORE, MIN_CLEAR_SIZE, MIN_SHARPNESS, align, encode_jpeg
from vaflow.extract.faces.detection import CenterFace, Face
from vaflow.extract.faces.identity import open_network, resolve
from vaflow.extract.faces.people import ClipFaces
from vaflow.extract.video import frames_at
from vaflow.files import write_file
from vaflow.pages import render
from vaflow.timeline import Grid, median_interval, nearest
from vaflow.viewer.clip_data import MediaIndex

SHOWN_CROPS = 10  # of each person, evenly over their time
CROP_SIZE = 88  # pixels on the page
COLUMNS = ("clip", "person", "track", "frame", "time", "x0", "y0", "x1", "y1", "score", "size", "sharpness", "yaw")

Arrays = dict[str, NDArray[Any]]
log = logging.getLogger(__name__)
TABLE = "faces.csv"
Jpegs = Sequence[bytes]  # one per face; empty: not stored


@dataclass(frozen=True)
class FacesOfClip:
    """The faces of one clip.

    Attributes:
        clip: its name; item: an item of the cache with its faces, "" if they were detected now.
        faces: arrays of the faces stream.
        items: number of a person -> the item with features of that person.
        step: seconds between two sampled frames; 0 if unknown.
        video: the file, if it was found.
        duration: seconds of the clip; infinite if unknown.
    """

    clip: str
    item: str
    faces: Arrays
    items: dict[int, str]
    step: float
    crops: Jpegs = ()
    video: Path | None = None
    duration: float = math.inf


@dataclass(frozen=True)
class PersonCard:
    """One person of a clip, for the page.

    Attributes:
        seconds, clear: in the picture, and with a clear face.
        spans: (start, end) seconds without a gap.
        size, sharpness, yaw: medians.
        crops: (seconds, data URL), in order of time.
    """

    number: int
    seconds: float
    clear: float
    tracks: int
    spans: tuple[tuple[float, float], ...]
    size: float
    sharpness: float
    yaw: float
    crops: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ClipCard:
    """One clip, for the page: its cuts, duration in seconds, people, and the items with features of a person."""

    item: str
    duration: float
    cuts: tuple[float, ...]
    people: tuple[PersonCard, ...]
    items: dict[int, str]

    def row(self, person: int) -> str:
        """The row of a table of choices that chooses a person, or leaves out the clip (0) or a person's item; or ""."""
        divided = bool(self.items) and self.item not in self.items.values()
        name, rule = (self.items.get(person, ""), "none") if divided and person else (self.item, f"id:{person}")
        text = StringIO()
        csv.writer(text, lineterminator="").writerow((name, rule if person else "none"))
        return text.getvalue() if name else ""


def cached_faces(cache: Cache, items: Sequence[str]) -> Iterator[FacesOfClip]:
    """The faces of the clips of a cache; the people of a clip share them."""
    known = cache.streams()
    visual = [name for name, info in known.items() if info.kind in ("visual", "pixels")]
    people: dict[str, dict[int, str]] = {}
    for item in items:
        if cache.has(FACES, item):
            meta = next((cache.record(name, item).meta for name in visual if cache.has(name, item)), {})
            people.setdefault(meta.get("clip", item), {})[meta.get("person") or 0] = item
    for clip, numbered in people.items():
        item = numbered[min(numbered)]  # has the crops
        crops = cache.read(CROPS, item).images if CROPS in known and cache.has(CROPS, item) else ()
        faces = dict(cache.read(FACES, item).arrays)
        with_pixels = PIXELS in known and cache.has(PIXELS, item) and "frame" in cache.record(PIXELS, item).arrays
        if not any(crops) and with_pixels:  # one person
            pixels = cache.read(PIXELS, item)
            image_of = dict(zip(pixels.frame.tolist(), pixels.images, strict=True))
            crops = [image_of.get(frame, b"") for frame in faces["frame"].tolist()]
        chosen = {number: name for number, name in numbered.items() if number}
        seconds = sum(cache.record(FACES, item).meta.get("seconds", ()))  # of every face
        step = seconds / max(len(faces["time"]), 1)
        duration = cache.meta(item).get("duration") if cache.has(LABELS, item) else None
        yield FacesOfClip(clip, item, faces, chosen, step, crops, duration=duration or math.inf)


def detected_faces(video: Path, network: str, grid: Grid) -> tuple[Arrays, float, float]:
    """The arrays of a video's faces, detected now; the seconds between two sampled frames, and of the video.

    Raises:
        MediaError: the video cannot be read.
    """
    times = frame_times(video)
    sampled_frames = np.unique(nearest(times, grid.sample_times(float(times[-1]))))
    detector = CenterFace()
    with ClipFaces(open_network(network)) as faces:
        for number, image in frames_at(video, sampled_frames, times):
            faces.add(number, float(times[number]), image, detector.detect(image))
        people = faces.people()
        return dict(people.arrays()), people.step, float(times[-1]) + median_interval(times)


def clip_card(clip: FacesOfClip) -> ClipCard:
    """A clip's people with their crops, stored or cut from the video, if there are any.

    Raises:
        DataError: a stored crop is not an image, or there are more or fewer crops than faces.
    """
    faces = clip.faces
    instants = np.unique(faces["time"])
    step = clip.step or median_interval(instants)
    numbers = np.unique(faces["person"]).tolist()
    shown = {}
    for number in numbers:
        mine = np.flatnonzero(faces["person"] == number)
        evenly = np.linspace(0, len(mine) - 1, min(SHOWN_CROPS, len(mine))).round().astype(int)
        shown[number] = mine[np.unique(evenly)].tolist()
    rows = sorted({row for rows in shown.values() for row in rows})
    if any(clip.crops):
        if len(clip.crops) != len(faces["time"]):
            problem = f"The crops of {clip.item} are not those of its faces"
            raise DataError(explain(problem, expected=f"{len(faces['time'])} images", got=len(clip.crops)))
        crops = {row: _data_url(clip.crops[row], f"Crop {row} of {clip.item}") for row in rows if clip.crops[row]}
    else:
        crops = _crops(faces, rows, clip.video) if clip.video else {}
    duration = min(float(instants[-1]) + step, clip.duration) if len(instants) else 0.0
    people = []
    for number in numbers:
        mine = faces["person"] == number
        times = faces["time"][mine]
        clear = (
            (faces["size"] >= MIN_CLEAR_SIZE)
            & (faces["score"] >= MIN_CLEAR_SCORE)
            & (faces["sharpness"] >= MIN_SHARPNESS)
            & (np.abs(faces["yaw"]) <= MAX_YAW)
        )
        breaks = np.flatnonzero(np.diff(times) > 1.5 * step)
        starts, ends = np.r_[times[0], times[breaks + 1]], np.r_[times[breaks], times[-1]] + step
        ends = np.minimum(ends, duration)
        medians = {name: float(np.median(faces[name][mine])) for name in ("size", "sharpness", "yaw")}
        people.append(
            PersonCard(
                number,
                min(len(times) * step, duration),
                min(int((clear & mine).sum()) * step, duration),
                len(np.unique(faces["track"][mine])),
                tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
                **medians,
                crops=tuple((float(faces["time"][row]), crops[row]) for row in shown[number] if row in crops),
            )
        )
    return ClipCard(clip.clip, duration, tuple(faces["cut"].tolist()), tuple(people), clip.items)


def _crops(faces: Arrays, rows: Sequence[int], video: Path) -> dict[int, str]:
    """Row -> its crop as a data URL."""
    rows_of_frame: dict[int, list[int]] = {}
    for row in rows:
        rows_of_frame.setdefault(int(faces["frame"][row]), []).append(row)
    made = {}
    for number, image in frames_at(video, np.array(sorted(rows_of_frame), np.int64), frame_times(video)):
        for row in rows_of_frame[number]:
            box = faces["box"][row].tolist()
            face = Face(
                (box[0], box[1], box[2], box[3]), float(faces["score"][row]), faces["landmarks"][row].astype(float)
            )
            made[row] = _data_url(encode_jpeg(align(image, face)), f"The crop of face {row}")
    return made


def _data_url(jpeg: bytes, name: str) -> str:
    """A crop in the size of the page; messages call it `name`. Raises MediaError."""
    small = np.asarray(Images.fromarray(decode_image(jpeg, name)).resize((CROP_SIZE, CROP_SIZE)), np.uint8)
    return "data:image/jpeg;base64," + b64encode(encode_jpeg(small, 80)).decode()


def faces_csv(clips: Sequence[tuple[str, Arrays]]) -> str:
    """All boxes, one row per face."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item, faces in clips:
        for row in range(len(faces["time"])):
            box = [f"{value:.1f}" for value in faces["box"][row].tolist()]
            measures = [f"{float(faces[name][row]):.3g}" for name in ("score", "size", "sharpness", "yaw")]
            whole = [int(faces[name][row]) for name in ("person", "track", "frame")]
            writer.writerow([item, *whole, f"{float(faces['time'][row]):.3f}", *box, *measures])
    return text.getvalue()


@dataclass(frozen=True)
class PeoplePage:
    """A written page: its clips, the table beside it, and the videos that could not be read."""

    clips: tuple[ClipCard, ...]
    table: Path
    unreadable: tuple[str, ...] = ()

    def facts(self) -> list[dict[str, Any]]:
        """The clips as plain JSON, without crops."""
        people = [[asdict(person) | {"crops": len(person.crops)} for person in clip.people] for clip in self.clips]
        return [asdict(clip) | {"people": those} for clip, those in zip(self.clips, people, strict=True)]


def write_people(
    path: Path,
    out: Path,
    media: Sequence[Path] = (),
    *,
    several: bool = False,
    identity: str = "auto",
    show_progress: bool = False,
) -> PeoplePage:
    """Write the page `out` and `faces.csv` beside it.

    Args:
        path: a cache, a video, or a directory of videos, whose faces are detected now.
        media: where the videos of a cache are, for crops that it does not hold.
        several: only clips with several people.
        identity: the network that tells the people of videos apart.

    Raises:
        UsageError: the cache has no stream of faces, the folder has no video, or `faces.csv` is another table.
    """
    table = out.parent / TABLE
    if table.is_file() and head(table).partition("\n")[0].strip() != ",".join(COLUMNS):
        problem = f"{table}, which is written beside the page, is another table"
        expected = "no such file, or one of vaflow faces"
        raise UsageError(explain(problem, expected=expected, remedy="Choose another --out"))
    unreadable: list[str] = []
    if is_cache(path):
        clip_people = _of_cache(open_cache(path), media)
    else:
        clip_people = _of_videos(path, resolve(identity), unreadable)
    clips, tables = [], []
    for clip in tqdm(clip_people, desc="faces", unit="clip", disable=not show_progress):
        if several and len(set(clip.faces["person"].tolist())) < 2:
            continue
        clips.append(clip_card(clip))
        tables.append((clip.clip, clip.faces))
    bare = [clip.item for clip in clips if clip.people and not any(person.crops for person in clip.people)]
    if bare:
        if media:
            reason = f"their videos are not below {', '.join(map(str, media))}, or have changed"
        else:
            reason = "the cache holds crops only of clips with several people. Add --media DIR with the videos"
        log.warning("No crops of %s (%s): %s", count(len(bare), "clip"), examples(bare), reason)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = PeoplePage(tuple(clips), out.parent / TABLE, tuple(unreadable))
    cache = shown_place(path) if is_cache(path) else ""
    write_file(out, render("faces.html", name=path.name, clips=clips, table=TABLE, cache=cache))
    write_file(page.table, faces_csv(tables))
    return page


def _of_cache(cache: Cache, media: Sequence[Path]) -> Iterator[FacesOfClip]:
    if FACES not in cache.streams():
        expected = "a cache that was extracted with --person main, left, right, speaking or id:K"
        remedy = "Show the faces of the videos instead: vaflow faces VIDEOS --out faces.html"
        raise UsageError(explain(f"{cache.path} has no stream of faces", expected=expected, remedy=remedy))
    files = {(file.name, file.stat().st_size): file for file in MediaIndex(media).files}
    for clip in cached_faces(cache, cache.items()):
        source = cache.record(LABELS, clip.item).source.get("video") or {}
        yield replace(clip, video=files.get((source.get("name", ""), source.get("size", -1))))


def _of_videos(path: Path, network: str, unreadable: list[str]) -> Iterator[FacesOfClip]:
    """The faces of videos; names of those that cannot be read are added to `unreadable`."""
    videos = [path] if path.is_file() else [c.video for c in open_dataset(path, "videos").clips if c.video is not None]
    if not videos:
        raise UsageError(explain(f"{path} holds no video", expected="a cache, a video, or a directory of videos"))
    for video in videos:
        try:
            faces, step, duration = detected_faces(video, network, Grid())
        except (MediaError, OSError) as error:
            log.warning("%s: %s", video.name, error)
            unreadable.append(video.name)
            continue
        yield FacesOfClip(video.stem, "", faces, {}, step, video=video, duration=duration)
