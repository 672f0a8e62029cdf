"""The page of `vaflow faces`: the people of clips, with crops over time; and all boxes as CSV."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.cache.schema import FACES, LABELS
from vaflow.datasets import open_dataset
from vaflow.errors import MediaError, UsageError, explain
from vaflow.extract.faces.identity import resolve
from vaflow.extract.faces.roster import Arrays, ClipCard, cached_faces, clip_card, detected_faces, faces_csv
from vaflow.files import write_file
from vaflow.pages import render
from vaflow.timeline import Grid
from vaflow.viewer.media import MediaIndex

log = logging.getLogger(__name__)

TABLE = "faces.csv"


@dataclass(frozen=True)
class PeoplePage:
    """A written page: its clips, and the table beside it."""

    clips: tuple[ClipCard, ...]
    table: Path

    def facts(self) -> list[dict[str, Any]]:
        """The clips as plain JSON, without crops."""
        people = [[asdict(person) | {"crops": len(person.crops)} for person in clip.people] for clip in self.clips]
        return [asdict(clip) | {"people": those} for clip, those in zip(self.clips, people, strict=True)]


def write_people(
    path: Path, out: Path, media: Sequence[Path] = (), *, several: bool = False, identity: str = "auto"
) -> PeoplePage:
    """Write the page `out` and `faces.csv` beside it.

    Args:
        path: a cache, a video, or a directory of videos, whose faces are detected now.
        out: the HTML file.
        media: where the videos of a cache are, for the crops.
        several: only clips with several people.
        identity: the network that tells the people of videos apart.

    Raises:
        UsageError: the cache has no stream of faces, or there is no video.
    """
    clip_people = _of_cache(open_cache(path), media) if is_cache(path) else _of_videos(path, resolve(identity))
    clips, tables = [], []
    for item, faces, items, video in clip_people:
        if several and len(set(faces["person"].tolist())) < 2:
            continue
        clips.append(clip_card(item, faces, items, video))
        tables.append((item, faces))
    out.parent.mkdir(parents=True, exist_ok=True)
    page = PeoplePage(tuple(clips), out.parent / TABLE)
    write_file(out, render("faces.html", name=path.name, clips=clips, table=TABLE))
    write_file(page.table, faces_csv(tables))
    return page


ClipFaces = tuple[str, Arrays, dict[int, str], Path | None]  # clip, its faces, person -> item with features, video


def _of_cache(cache: Cache, media: Sequence[Path]) -> Iterator[ClipFaces]:
    if FACES not in cache.streams():
        raise UsageError(
            explain(
                f"{cache.path} has no stream of faces",
                expected="a cache that was extracted with --person main, left, right, speaking or id:K",
                remedy="Show the faces of the videos instead: vaflow faces VIDEOS --out faces.html",
            )
        )
    files = {(file.name, file.stat().st_size): file for file in MediaIndex(media).files}
    for clip, item, faces, items in cached_faces(cache, cache.items()):
        source = cache.record(LABELS, item).source.get("video") or {}
        yield clip, faces, items, files.get((source.get("name", ""), source.get("size", -1)))


def _of_videos(path: Path, network: str) -> Iterator[ClipFaces]:
    videos = [path] if path.is_file() else [c.video for c in open_dataset(path, "videos").clips if c.video is not None]
    if not videos:
        raise UsageError(explain(f"{path} holds no video", expected="a cache, a video, or a directory of videos"))
    for video in videos:
        try:
            faces = detected_faces(video, network, Grid())
        except (MediaError, OSError) as error:
            log.warning("%s: %s", video.name, error)
            continue
        yield video.stem, faces, {}, video
