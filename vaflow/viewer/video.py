"""Videos of a clip: transcoded for browsers, and with face box, traces and the valence-arousal plane burnt in."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray
from PIL import Image as Pictures
from PIL import ImageDraw, ImageFont

from vaflow.errors import MediaError, explain
from vaflow.timeline import Floats, nearest
from vaflow.viewer import DIMENSIONS, Predictions, find_predictions, read_predictions
from vaflow.viewer.clip_data import MediaIndex, decoded, masks_of, spans, with_boxes

Image = NDArray[np.uint8]

MAX_HEIGHT = 720  # pixels of transcoded clips
_CLOCK = 90_000  # ticks per second of transcoded clips
PANEL = 260  # pixels of the plane's side
TRACE = 80  # pixels of a trace's height
MARGIN = 64  # pixels left of the traces
TAIL = 3.0  # seconds
BACK, GRID, TEXT = (20, 22, 24), (60, 65, 70), (233, 234, 236)
PREDICTION, LABEL, BOX = (107, 184, 242), (255, 160, 92), (255, 212, 0)
BAND, FAR = (38, 60, 77), (255, 126, 182)


def transcode(source: Path, target: Path, composer: "_Overlay | None" = None) -> None:
    """Write a clip as H.264 and AAC in MP4, with the presentation time of every frame kept.

    Raises:
        OSError, av.FFmpegError: the file cannot be decoded or written.
    """
    part = target.with_suffix(".part.mp4")
    with av.open(str(source), metadata_errors="replace") as media:
        first = next(iter(media.decode(video=0)), None) if media.streams.video else None
    with av.open(str(source), metadata_errors="replace") as media, av.open(str(part), "w", format="mp4") as out:
        start = (media.start_time or 0) / av.time_base
        encoders: dict[Any, _VideoEncoder | _AudioEncoder] = {}  # all added before the first packet
        if first is not None:
            encoders[media.streams.video[0]] = _VideoEncoder(out, media.streams.video[0], first, start, composer)
        if media.streams.audio:
            encoders[media.streams.audio[0]] = _AudioEncoder(out, start)
        for stream, frame in decoded(media, list(encoders)):
            encoders[stream].add(frame)
        for encoder in encoders.values():
            encoder.finish()
    part.replace(target)


class _AudioEncoder:
    """AAC in stereo, from the time of the first samples on."""

    def __init__(self, out: Any, start: float) -> None:
        self._out, self._start = out, start
        self._stream = out.add_stream("aac", rate=48_000, layout="stereo")
        self._resampler = AudioResampler(format="fltp", layout="stereo", rate=48_000)
        self._samples: int | None = None

    def add(self, frame: Any) -> None:
        if self._samples is None:
            self._samples = max(0, round(((frame.time or self._start) - self._start) * 48_000))
        for piece in self._resampler.resample(frame):
            piece.pts, piece.time_base = self._samples, Fraction(1, 48_000)
            self._samples += piece.samples
            self._out.mux(self._stream.encode(piece))

    def finish(self) -> None:
        self._out.mux(self._stream.encode(None))


class _VideoEncoder:
    """H.264 at the times of the source, without reordering, with a key frame at least every 15 frames."""

    def __init__(self, out: Any, source: Any, first: Any, start: float, composer: "_Overlay | None") -> None:
        self._out, self._base, self._start, self._last = out, source.time_base, start, -1
        self._composer = composer
        sides = (first.width, first.height)
        width, height = sides[::-1] if round(first.rotation / 90) % 2 else sides
        scale = min(1.0, MAX_HEIGHT / height)
        self._inner = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
        outer = self._inner if composer is None else composer.size(*self._inner)
        stream = self._stream = out.add_stream("libx264", rate=source.average_rate or 25)
        stream.width, stream.height = outer
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, _CLOCK)
        stream.codec_context.options = {"crf": "20", "preset": "veryfast", "bf": "0", "g": "15"}

    def add(self, frame: Any) -> None:
        if frame.pts is None:
            return
        time = float(frame.pts * self._base) - self._start
        turned = round(frame.rotation / 90) % 4
        shown = frame
        if turned or self._composer is not None:
            sides = self._inner[::-1] if turned % 2 else self._inner
            image = np.rot90(frame.reformat(*sides, "rgb24").to_ndarray(), turned)
            image = image if self._composer is None else self._composer.draw(image, time)
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        shown = shown.reformat(self._stream.width, self._stream.height, "yuv420p")
        self._last = max(round(time * _CLOCK), self._last + 1)
        shown.pts, shown.time_base, shown.pict_type = self._last, Fraction(1, _CLOCK), 0
        self._out.mux(self._stream.encode(shown))

    def finish(self) -> None:
        self._out.mux(self._stream.encode(None))


def write_overlay(
    media: Path,
    table: Predictions,
    out: Path,
    *,
    boxes: Floats | None = None,
    centers: float = 0.66,
    demonstration: bool = False,
) -> None:
    """Write the overlay of one clip as MP4.

    Args:
        boxes: [T, 5] seconds and x0, y0, x1, y1 in shares of the frame; None: no box is drawn.
        centers: of the nine regions, whose borders the plane shows.
        demonstration: mark the video, because its encoders have random weights.

    Raises:
        MediaError: the clip has no video, or cannot be decoded.
        OSError: the disk refuses.
    """
    try:
        with av.open(str(media), metadata_errors="replace") as opened:
            if not opened.streams.video:
                raise MediaError(explain(f"{media} has no video", expected="a video stream for --video"))
        transcode(media, out, _Overlay(table, boxes, centers, demonstration))
    except av.FFmpegError as error:
        raise MediaError(explain(f"Cannot write the overlay of {media}", got=error)) from error


def write_overlays(
    predictions: Path, media: Sequence[Path] = (), cache: Path | None = None
) -> Iterator[tuple[str, Path | None, str]]:
    """Write `<clip>.overlay.mp4` beside each prediction CSV; yields (clip, file or None, what failed).

    `media` and `cache` are those of `vaflow.viewer.page.ViewConfig`.

    Raises:
        UsageError: the run has no predictions.
        CorruptError: a prediction file is damaged.
    """
    prediction_set = find_predictions(predictions)
    opened, index = prediction_set.open_cache(cache), MediaIndex(media)
    for clip in prediction_set.clips:
        file, table = index.find(clip), read_predictions(clip.csv)
        out = clip.csv.with_name(f"{clip.csv.name.removesuffix('.csv')}.overlay.mp4")
        if file is None:
            yield clip.item, None, "its media file was not found"
            continue
        masks, _ = with_boxes(masks_of(table, opened, clip.item, prediction_set.streams), file, detect=True)
        try:
            marked = bool(prediction_set.demonstration)
            write_overlay(file, table, out, boxes=masks.boxes, centers=prediction_set.centers, demonstration=marked)
            yield clip.item, out, ""
        except (MediaError, OSError) as error:
            yield clip.item, None, str(error)


class _Overlay:
    """Draws on a canvas whose still parts are made once."""

    def __init__(self, table: Predictions, boxes: Floats | None, centers: float, demonstration: bool) -> None:
        self._table, self._boxes, self._centers, self._demonstration = table, boxes, centers, demonstration
        self._end = max(float(table.time[-1]), 1e-3)
        self._still = Pictures.new("RGB", (2, 2))
        self._inner = (2, 2)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The frame, the plane at its right, the traces below both."""
        self._inner = (width, height)
        tall = max(height, PANEL) + 2 * TRACE + 24
        self._still = Pictures.new("RGB", (width + PANEL, tall + tall % 2), BACK)
        self._draw_still(ImageDraw.Draw(self._still))
        return self._still.size

    def draw(self, image: Image, time: float) -> Image:
        """The canvas at an instant."""
        canvas = self._still.copy()
        canvas.paste(Pictures.fromarray(np.ascontiguousarray(image)), (0, 0))
        pen = ImageDraw.Draw(canvas)
        row = int(nearest(self._table.time, np.array([time]))[0])
        self._draw_box(pen, time)
        self._draw_points(pen, row)
        x = self._x(time)
        pen.line([(x, self._top(0)), (x, self._top(1) + TRACE)], TEXT, 2)
        values = ", ".join(f"{d} {x:+.2f}" for d, x in zip(DIMENSIONS, self._table.va[row], strict=True))
        pen.text((8, self._top(1) + TRACE + 4), f"{time:7.2f} s   {values}", TEXT, ImageFont.load_default(14))
        return np.asarray(canvas)

    def _top(self, k: int) -> int:
        return max(self._inner[1], PANEL) + k * TRACE

    def _x(self, time: float) -> float:
        return MARGIN + (self._still.width - MARGIN - 8) * min(max(time / self._end, 0), 1)

    def _y(self, k: int, value: float) -> float:
        return self._top(k) + TRACE / 2 - (TRACE / 2 - 6) * min(max(value, -1), 1)

    def _point(self, va: Floats) -> tuple[float, float]:
        side = PANEL - 44
        return self._inner[0] + 28 + (va[0] + 1) / 2 * side, 16 + (1 - va[1]) / 2 * side

    def _draw_still(self, pen: ImageDraw.ImageDraw) -> None:
        font = ImageFont.load_default(13)
        table = self._table
        rows = np.unique(np.linspace(0, len(table.time) - 1, 2000).astype(int))
        for k, name in enumerate(DIMENSIONS):
            for value in (-1, 0, 1):
                y = self._y(k, value)
                pen.line([(MARGIN, y), (self._still.width - 8, y)], GRID)
            pen.text((4, self._y(k, 0) - 8), name, TEXT, font)
            if table.std is not None:
                edges = [table.va[rows, k] + sign * 1.96 * table.std[rows, k] for sign in (1, -1)]
                across = [self._x(time) for time in table.time[rows]]
                upper, lower = ([(at, self._y(k, y)) for at, y in zip(across, edge, strict=True)] for edge in edges)
                pen.polygon([*upper, *lower[::-1]], BAND)
            for begin, end in [] if table.far is None else spans(table.far, table.time).tolist():
                pen.rectangle([self._x(begin), self._top(k) + TRACE - 5, self._x(end), self._top(k) + TRACE - 2], FAR)
            if table.label is not None:
                labelled = np.flatnonzero(np.isfinite(table.label[:, k]))
                for at in labelled[:: max(1, ceil(6 * len(labelled) / len(rows)))]:  # dots: colour is not needed
                    x, y = self._x(table.time[at]), self._y(k, table.label[at, k])
                    pen.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], LABEL)
            pen.line([(self._x(table.time[i]), self._y(k, table.va[i, k])) for i in rows], PREDICTION, 2)
        for edge in (-1, -self._centers / 2, self._centers / 2, 1):
            pen.line([self._point(np.array([edge, -1])), self._point(np.array([edge, 1]))], GRID)
            pen.line([self._point(np.array([-1, edge])), self._point(np.array([1, edge]))], GRID)
        pen.text((self._inner[0] + PANEL // 2 - 20, PANEL - 24), "valence", TEXT, font)
        pen.text((self._inner[0] + 30, 0), "arousal (up)", TEXT, font)
        if self._demonstration:
            pen.text((self._still.width - 250, self._top(1) + TRACE + 4), "demonstration: random encoders", LABEL, font)

    def _draw_points(self, pen: ImageDraw.ImageDraw, row: int) -> None:
        table = self._table
        first = int(np.searchsorted(table.time, table.time[row] - TAIL))
        tail = [self._point(table.va[i]) for i in range(first, row + 1, max(1, (row - first) // 60))]
        for i in range(len(tail) - 1):
            share = 0.15 + 0.7 * i / len(tail)
            color = tuple(round(b + share * (p - b)) for b, p in zip(BACK, PREDICTION, strict=True))
            pen.line(tail[i : i + 2], color, 3)
        if table.label is not None and np.isfinite(table.label[row]).all():
            x, y = self._point(table.label[row])
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], outline=LABEL, width=2)
        x, y = self._point(table.va[row])
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], PREDICTION)

    def _draw_box(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        if self._boxes is None or not len(self._boxes):
            return
        at, *box = self._boxes[int(nearest(self._boxes[:, 0], np.array([time]))[0])]
        if abs(at - time) <= 1 and np.isfinite(box).all():
            pen.rectangle([side * s for side, s in zip(box, self._inner * 2, strict=True)], outline=BOX, width=2)
