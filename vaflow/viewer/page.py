"""The viewer: a page for the clips of a run or of a folder of predictions, with their media beside it.

OUT/index.html      list, player and plots; opens from disk
    clips/0001.js   data of one clip, loaded when it is shown
    media/          clips that browsers do not play, transcoded; with `copy`, all clips
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import numpy as np

from vaflow import __version__
from vaflow.cache import Cache
from vaflow.errors import DataError, UsageError, explain
from vaflow.extract.video import frame_times
from vaflow.pages import UPLOT, render, script_json
from vaflow.viewer.clip_data import STEP, ClipMasks, detect_boxes, masks_of, payload, scores_of
from vaflow.viewer.media import AudioLevel, MediaIndex, audio_level, probe, transcode
from vaflow.viewer.predictions import (
    PredictedClip,
    Predictions,
    PredictionSet,
    find_predictions,
    is_prediction_table,
    read_predictions,
)

log = logging.getLogger(__name__)

SCRIPTS = (UPLOT, "core.js", "traces.js", "lanes.js", "plane.js", "clock.js", "rating.js", "clip_list.js", "viewer.js")
UNREADABLE = (OSError, av.FFmpegError)
PAGE = "index.html"
_OF_A_PAGE = re.compile(r"\d{4,}(-[0-9a-f]{8})?(\.part)?\.\w+")  # files of clips


@dataclass(frozen=True)
class ViewConfig:
    """How to write the viewer.

    Attributes:
        media: directories or files with the clips; searched by the name and size that the cache recorded.
        cache: read masks and face boxes from here; None: the cache that the predictions name.
        copy: copy every clip beside the page, so that the directory can be moved.
        boxes: detect faces for the boxes, where the cache stores none.
    """

    media: Sequence[Path] = ()
    cache: Path | None = None
    copy: bool = False
    boxes: bool = False


@dataclass(frozen=True)
class PageClip:
    """One clip of a viewer. `media` is its file; `facts` go into the page."""

    item: str
    media: Path | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Viewer:
    """A written viewer."""

    page: Path
    predictions: PredictionSet
    clips: tuple[PageClip, ...] = field(default=())

    def html(self, *, serve: Mapping[str, str] | None = None) -> str:
        """Return the page. With `serve`, media come from `media/N` of a server that saves ratings."""
        prediction_set = self.predictions
        facts = [
            {**c.facts, "media": f"media/{i}" if serve and c.media else c.facts["media"]}
            for i, c in enumerate(self.clips, 1)
        ]
        data = {"clips": facts, "centers": prediction_set.centers, "sigma": prediction_set.sigma, "serve": serve}
        return render(
            "viewer.html",
            scripts=SCRIPTS,
            data=data,
            folder=True,
            connect=serve is not None,
            name=prediction_set.path.resolve().name or str(prediction_set.path),
            streams=prediction_set.streams,
            demonstration=prediction_set.demonstration,
            count=len(facts),
            version=__version__,
        )


def write_viewer(path: Path, out: Path, clips: Sequence[str] = (), config: ViewConfig | None = None) -> Viewer:
    """Write the viewer of `path`'s predictions into the directory `out`.

    Args:
        path: a run directory, a directory of predictions, a prediction CSV, or videos without predictions, to rate.
        clips: ids to show; all when empty.

    Raises:
        UsageError: no predictions, no clip of that id, or `out` cannot be written or holds other files.
        CorruptError: a prediction file is damaged.
    """
    config = config or ViewConfig()
    prediction_set = find_predictions(path, clips) if has_predictions(path) else media_without_predictions(path, clips)
    cache = prediction_set.open_cache(config.cache)
    index = MediaIndex(config.media)
    try:
        _refuse_other_files(out)
        (out / "clips").mkdir(parents=True, exist_ok=True)
        (out / "media").mkdir(exist_ok=True)
        if not (out / PAGE).exists():
            (out / PAGE).write_text("<!-- vaflow view is writing this page -->\n", "utf-8")
        shown = [
            _write_clip(out, n, clip, cache, prediction_set, index, config)
            for n, clip in enumerate(prediction_set.clips, 1)
        ]
        viewer = Viewer(out / PAGE, prediction_set, tuple(shown))
        viewer.page.write_text(viewer.html(), "utf-8")
        _remove_clips_of_earlier_pages(out, shown)
    except OSError as error:
        raise UsageError(explain(f"Cannot write the viewer to {out}", got=error.strerror)) from error
    lost = sum(clip.media is None for clip in shown)
    if lost:
        log.warning("Clips without a media file: %d of %d. Add --media DIR to show them", lost, len(shown))
    return viewer


def _refuse_other_files(out: Path) -> None:
    """Raise UsageError if the files of a page would mix with those of somebody else."""
    page, problem = out / PAGE, ""
    if page.is_file():
        problem = "" if "vaflow" in page.read_text("utf-8", errors="replace") else PAGE
    else:
        problem = next(
            (name for name in ("clips", "media") if (out / name).is_dir() and any((out / name).iterdir())), ""
        )
    if problem:
        expected = "a new directory, or that of an earlier page"
        raise UsageError(
            explain(f"{out} holds other files", expected=expected, got=problem, remedy="Choose another --out")
        )


def _remove_clips_of_earlier_pages(out: Path, shown: Sequence[PageClip]) -> None:
    media = {clip.media.name for clip in shown if clip.media is not None and clip.media.parent == out / "media"}
    kept = media | {f"{number:04}.js" for number in range(1, len(shown) + 1)}
    for file in (*(out / "clips").iterdir(), *(out / "media").iterdir()):
        if _OF_A_PAGE.fullmatch(file.name) and file.name not in kept:
            file.unlink()


def has_predictions(path: Path) -> bool:
    """Whether a path is a run, a prediction table or a directory with one, rather than media."""
    if path.suffix == ".csv" or (path / "config.toml").is_file():
        return True
    return any(is_prediction_table(csv) for csv in path.rglob("*.csv"))


def media_without_predictions(path: Path, clips: Sequence[str]) -> PredictionSet:
    """The media files of a path as clips to rate. Raises UsageError if the path has none."""
    files = MediaIndex([path] if path.exists() else []).files
    root = path if path.is_dir() else path.parent
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    twice = {name for name in names if names.count(name) > 1}
    clips_to_rate = []
    for file, name in zip(files, names, strict=True):
        item = file.relative_to(root).as_posix() if name in twice else name
        if not clips or item in clips:
            clips_to_rate.append(PredictedClip(item, file, source={"media": str(file)}))
    if not clips_to_rate:
        return find_predictions(path, clips)  # raises the error
    return PredictionSet(path, tuple(sorted(clips_to_rate, key=lambda clip: clip.item)))


def unpredicted(media: Path) -> Predictions:
    """A table without values at the frames of a clip; of audio, 25 rows per second."""
    try:
        facts = probe(media)
        time = frame_times(media) if facts.video else np.arange(0, max(facts.seconds, 0.04), 0.04)
    except (DataError, *UNREADABLE):
        time = np.zeros(1)
    return Predictions(time, np.full((len(time), 2), np.nan))


def _write_clip(
    out: Path,
    number: int,
    clip: PredictedClip,
    cache: Cache | None,
    prediction_set: PredictionSet,
    index: MediaIndex,
    config: ViewConfig,
) -> PageClip:
    table = read_predictions(clip.csv) if clip.csv.suffix == ".csv" else unpredicted(clip.csv)
    masks = masks_of(table, cache, clip.item, prediction_set.streams)
    media, notes = index.find(clip), []
    shown, level = None, None
    if media is None:
        notes.append("The media file was not found; the traces are shown without it.")
    else:
        shown, level, problem = _show_media(media, out / "media" / f"{number:04}.mp4", config.copy)
        notes += [problem] if problem else []
    masks, note = with_boxes(masks, shown and media, config.boxes)
    notes += [note] if note else []
    if table.far is not None and table.far.any():
        notes.append(f"{table.far.mean():.1%} of the frames have features far from those of the training split.")
    text = script_json([number, payload(table, masks, level)])
    (out / "clips" / f"{number:04}.js").write_text(f"vaflow.receive({text})\n", "utf-8")
    facts = {
        "number": number,
        "id": clip.item,
        "split": clip.split,
        "media": None if shown is None else quote(os.path.relpath(shown, out).replace(os.sep, "/")),
        "video": bool(shown and probe(shown).video),
        "notes": notes,
        **asdict(scores_of(table, masks)),
    }
    return PageClip(clip.item, shown, facts)


def with_boxes(masks: ClipMasks, media: Path | None, detect: bool) -> tuple[ClipMasks, str]:
    """The masks with face boxes, detected where `detect` is set and the cache has none; and a note about them."""
    if masks.boxes is not None:
        return masks, ""
    if not detect or media is None:
        return masks, "No face boxes are drawn: the cache stores none. vaflow view --boxes detects them."
    try:
        boxes = detect_boxes(media)
    except UNREADABLE as error:
        log.warning("No face boxes of %s: %s", media, error)
        return masks, "Face boxes could not be detected."
    note = f"Face boxes were detected for this page, every {STEP:g} s, with the detector of vaflow extract."
    if not np.isfinite(boxes[:, 1:]).any():
        note = "No face box is drawn: the face detector detected no face in this clip."
    return replace(masks, boxes=boxes), note


def _show_media(media: Path, beside: Path, copy: bool) -> tuple[Path | None, AudioLevel | None, str]:
    """(file that the page plays, its audio level, a note for the page)."""
    try:
        facts = probe(media)
        level = audio_level(media) if facts.audio else None
        if not facts.playable:
            status = media.stat()  # the name states the source: another page may have shown another clip at this number
            source = f"{media.resolve()} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape")
            beside = beside.with_stem(f"{beside.stem}-{blake2b(source, digest_size=4).hexdigest()}")
            if not beside.exists():
                log.info("Transcoding %s", media.name)
                transcode(media, beside)
            codec = " and ".join(filter(None, (facts.video, facts.audio)))
            return beside, level, f"Browsers do not play this file ({codec}); the page shows a transcoded copy."
        if copy:
            beside = beside.with_suffix(media.suffix)
            beside.write_bytes(media.read_bytes())
            return beside, level, ""
        return media.resolve(), level, ""
    except UNREADABLE as error:
        log.warning("%s cannot be shown: %s", media, getattr(error, "strerror", None) or error)
        return None, None, "The media file cannot be decoded; the traces are shown without it."
