"""The viewer: a page for the clips of a run or of a folder of predictions, and a server for it on this machine.

OUT/index.html      list, player and plots; opens from disk
    clips/0001.js   data of one clip, loaded when it is shown
    media/          clips that browsers do not play, transcoded; with `copy`, all clips

The server plays clips and saves ratings into a directory. It binds to the loopback address, answers only to its own
host name, and accepts ratings only with the token that is in its page. It serves the files of the viewer and lists no
directories.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, pairwise
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vaflow import __version__
from vaflow.cache import Cache
from vaflow.errors import DataError, UsageError, explain
from vaflow.extract.container import frame_times
from vaflow.files import write_file
from vaflow.pages import UPLOT, render, script_json
from vaflow.viewer import (
    PredictedClip,
    Predictions,
    PredictionSet,
    find_predictions,
    is_prediction_table,
    read_predictions,
)
from vaflow.viewer.clip_data import (
    UNREADABLE,
    AudioLevel,
    MediaIndex,
    audio_level,
    masks_of,
    payload,
    probe,
    scores_of,
    with_boxes,
)
from vaflow.viewer.video import transcode

log = logging.getLogger(__name__)

SCRIPTS = (UPLOT, "core.js", "traces.js", "lanes.js", "plane.js", "clock.js", "rating.js", "clip_list.js", "viewer.js")
PAGE = "index.html"
HOST = "127.0.0.1"
_LIMIT = 64 * 2**20  # bytes of one posted rating
_BLOCK = 2**20
_ROW = re.compile(r"(\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?),[^,\n]*")
_NAME = re.compile(r"[\w][\w .-]{0,59}")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
HEADER = "time,valence,arousal,annotator"
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
        media = {clip.media.name for clip in shown if clip.media is not None and clip.media.parent == out / "media"}
        kept = media | {f"{number:04}.js" for number in range(1, len(shown) + 1)}
        for file in (*(out / "clips").iterdir(), *(out / "media").iterdir()):  # clips of earlier pages
            if _OF_A_PAGE.fullmatch(file.name) and file.name not in kept:
                file.unlink()
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


class ViewerServer(ThreadingHTTPServer):
    """Serve a written viewer; `ratings` receives `<annotator>/<clip>.csv`.

    Raises:
        UsageError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, viewer: Viewer, ratings: Path, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            problem = f"Cannot listen on port {port}"
            raise UsageError(explain(problem, got=error.strerror, remedy="Choose another --port")) from error
        self.viewer, self.ratings = viewer, ratings
        self.token = secrets.token_urlsafe(24)
        self.saved_by: dict[tuple[str, str], str] = {}  # annotator and clip -> the loaded page that wrote the file
        self.page = viewer.html(serve={"token": self.token}).encode()
        self.files = {f"/clips/{n:04}.js": viewer.page.parent / f"clips/{n:04}.js" for n, _ in self._numbered()}
        self.files |= {f"/media/{n}": clip.media for n, clip in self._numbered() if clip.media is not None}

    def _numbered(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.viewer.clips, 1))

    @property
    def address(self) -> str:
        """The URL of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        if not self._from_our_page():
            return
        path = self.path.split("?")[0]
        if path == "/":
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        elif path in self.server.files:
            self._send_file(self.server.files[path])
        else:
            self._answer(404, b"not found")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._from_our_page():
            return
        if self.path != "/ratings" or not length.isdigit() or int(length) > _LIMIT:
            self.close_connection = True
            self._answer(400, b"not a rating")
            return
        body = self.rfile.read(int(length))
        if not secrets.compare_digest(self.headers.get("X-Vaflow-Token", "").encode(), self.server.token.encode()):
            self._answer(403, b"wrong token")
            return
        try:
            document = json.loads(body)
            clip, annotator, text = (str(document[key]) for key in ("clip", "annotator", "csv"))
            page = str(document.get("page", ""))
            clips = {clip.item for clip in self.server.viewer.clips}
            mine = self.server.saved_by.get((annotator, clip)) == page
            saved = save_rating(self.server.ratings, clips, clip, annotator, text, replace=mine)
            self.server.saved_by[annotator, clip] = page
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._answer(400, str(error).encode())
        except OSError as error:
            self._answer(500, str(error.strerror).encode())
        else:
            self._answer(200, str(saved.relative_to(self.server.ratings)).encode())

    def _from_our_page(self) -> bool:
        """Whether the headers Host and Origin name this server; prevents DNS rebinding."""
        hosts = {f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts):
            return True
        self.close_connection = True
        self._answer(403, b"another host")
        return False

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self._headers(kind, len(body))
        self.wfile.write(body)

    def _headers(self, kind: str, length: int, *more: tuple[str, str]) -> None:
        fixed = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"), ("Accept-Ranges", "bytes"))
        for name, value in (("Content-Type", kind), ("Content-Length", str(length)), *fixed, *more):
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, path: Path) -> None:
        """The file or the range of it that the browser wants: seeking needs ranges."""
        try:
            size = path.stat().st_size
            file = path.open("rb")
        except OSError:
            self._answer(404, b"not found")
            return
        with file:
            kind = guess_type(path.name)[0] or "application/octet-stream"
            requested = _RANGE.fullmatch(self.headers.get("Range", ""))
            first, last = 0, size - 1
            if requested and any(requested.groups()):
                begin, end = requested.groups()
                first = int(begin) if begin else max(0, size - int(end))
                last = min(last, int(end)) if begin and end else last
                if first > last:
                    self.send_response(416)
                    self._headers(kind, 0, ("Content-Range", f"bytes */{size}"))
                    return
                self.send_response(206)
                self._headers(kind, last - first + 1, ("Content-Range", f"bytes {first}-{last}/{size}"))
            else:
                self.send_response(200)
                self._headers(kind, size)
            file.seek(first)
            left = last - first + 1
            try:
                while left > 0 and (block := file.read(min(_BLOCK, left))):
                    self.wfile.write(block)
                    left -= len(block)
            except ConnectionError:  # a browser that seeks closes the connection
                self.close_connection = True


def save_rating(folder: Path, clips: set[str], clip: str, annotator: str, text: str, *, replace: bool = True) -> Path:
    """Write one annotator's label CSV of one clip, and return its path.

    Args:
        replace: the file; otherwise an earlier one is kept as `<clip>.csv.1`, `.2`, ...

    Raises:
        DataError: the clip is not of this viewer, the name cannot be used, or the text is not a rating.
        OSError: the disk refuses.
    """
    if clip not in clips:
        raise DataError(explain("The viewer has no such clip", got=clip))
    if not _NAME.fullmatch(annotator):
        expected = "letters, digits, spaces, points and dashes, beginning with a letter or digit"
        raise DataError(explain("The annotator's name cannot be used", expected=expected, got=annotator))
    lines = text.rstrip("\n").split("\n")
    rows = [_ROW.fullmatch(line) for line in lines[1:]]
    numbers = [tuple(map(float, row.groups())) for row in rows if row]
    ascending = all(a[0] < b[0] for a, b in pairwise(numbers))
    inside = all(abs(x) <= 1 for row in numbers for x in row[1:])
    if lines[0] != HEADER or not numbers or len(numbers) != len(rows) or not ascending or not inside:
        raise DataError(explain("The text is not a rating", expected=f"columns {HEADER}; times that ascend"))
    path = folder / annotator / f"{clip}.csv"
    body = "".join(f"{t:.6f},{v:.4f},{a:.4f},{annotator}\n" for t, v, a in numbers)
    if path.exists() and not replace:
        path.rename(next(kept for n in count(1) if not (kept := path.with_name(f"{path.name}.{n}")).exists()))
    write_file(path, f"{HEADER}\n{body}")
    return path
