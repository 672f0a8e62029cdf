"""The page of `vaflow check --html`: one file with figures and images; nothing is fetched and all text is escaped.

Figures are inline SVG. The style sheet of the page sets their colours, so that they follow light, dark and print;
position and text repeat what colour shows. Images are small: face crops of a clip if it has them, else video frames.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from av.error import FFmpegError
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from vaflow.datasets.clip import SEVERITIES, Clip, Note
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import MediaError
from vaflow.extract.container import decode, opened
from vaflow.extract.decoding_pool import Failed, each
from vaflow.extract.doctor import Checked, Report, Summary, describe, occupancy
from vaflow.extract.doctor.facts import BINS, BORDER, CELLS, LabelStats, some
from vaflow.extract.source_files import list_crops, list_stills, read_crop
from vaflow.extract.video import to_rgb
from vaflow.pages import render

THUMBNAIL = 112  # pixels of the longer edge of an image
QUALITY = 80
IMAGES = 4  # of a clip
PLACES = (0.05, 0.35, 0.65, 0.95)  # of the duration: times of the frames of a video
_MICROSECONDS = 1_000_000


ClipDuration = tuple[Clip, float | None]  # arguments of `thumbnails`
CLIPS_WITH_IMAGES = 24  # clips with images
LISTED = 500  # clips in the table
NAMED = 200  # findings of a kind
SIDE, LEFT, BELOW, ABOVE = 360, 46, 40, 8  # pixels of the label map: the square, its margins
PLOT_WIDTH, PLOT_HEIGHT = 420, 120
TRACK, GAP = 8, 3  # pixels: the height of a bar, and the space between two


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
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    target = BytesIO()
    small.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()


ClipImages = Mapping[str, Sequence[Thumbnail]]  # by clip


def html_page(report: Report, images: ClipImages) -> str:
    """Return the whole page as HTML.

    Args:
        images: images of the clips that `clips_with_images` returns.
    """
    splits, total, about = report.splits(), report.total(), _by_item(report)
    worst = {name: min((SEVERITIES.index(note.severity) for note in notes), default=9) for name, notes in about.items()}
    ordered = sorted(report.checked, key=lambda c: (worst[c.clip.id], c.clip.id))
    stats = {name: summary.stats for name, summary in splits.items() if summary.stats.count.sum()}
    return render(
        "check.html",
        name=report.root.name,
        root=report.root,
        layout=report.layout,
        counts=[(report.count(severity), severity) for severity in SEVERITIES],
        total=_summary("all", total),
        kinds=report.kinds(),
        named=NAMED,
        splits=[_summary(name, summary) for name, summary in splits.items()],
        labelled=list(stats),
        maps=[
            (name, int(each.regions.sum()), Markup(label_map(each, f"Labels of {name} over valence and arousal")))
            for name, each in stats.items()
            if each.regions.sum()
        ],
        plots=[Markup(distribution(stats, k, name)) for k, name in enumerate(("valence", "arousal"))] if stats else [],
        cards=[_card(c, about[c.clip.id], images.get(c.clip.id, ())) for c in clips_with_images(report)],
        clips=[_clip(checked, about[checked.clip.id]) for checked in ordered[:LISTED]],
        checked=len(ordered),
    )


def clips_with_images(report: Report, limit: int = CLIPS_WITH_IMAGES) -> list[Checked]:
    """Clips to show: one of every kind of finding in turn, errors first, then the second of every kind, and so on."""
    by_id = {checked.clip.id: checked for checked in report.checked}
    ranks = zip_longest(*([item for item in kind.items if item in by_id] for kind in report.kinds()))
    names = dict.fromkeys(name for rank in ranks for name in rank if name is not None)
    return [by_id[name] for name in list(names)[:limit]]


def _summary(name: str, summary: Summary) -> dict[str, Any]:
    covered = summary.crop_frames - summary.crops_missing
    return {
        "name": name,
        "clips": summary.clips,
        "usable": summary.usable,
        "videos": summary.groups,
        "hours": f"{summary.seconds / 3600:.2f}",
        "frames": f"{summary.frames:,}",
        "annotated": _percent(summary.annotated, summary.label_frames),
        "cropped": _percent(covered, summary.crop_frames),
        "spreads": _spreads(describe(summary.stats)),
    }


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _spreads(described: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Mean and standard deviation of valence and of arousal."""
    rows = [described.get(name) for name in ("valence", "arousal")]
    return [f"{row['mean']:.2f} ± {row['std']:.2f}" if row else "-" for row in rows]


def _by_item(report: Report) -> dict[str, list[Note]]:
    """Findings of every clip, worst first; a leak belongs to every clip of its source video."""
    about: dict[str, list[Note]] = {checked.clip.id: [] for checked in report.checked}
    group: dict[str, list[str]] = {}
    for checked in report.checked:
        group.setdefault(checked.clip.group, []).append(checked.clip.id)
    for note in report.findings:
        for name in group.get(note.item, ()) if note.code == "leak" else (note.item,):
            if name in about:
                about[name].append(note)
    return about


def _card(checked: Checked, about: Sequence[Note], images: Sequence[Thumbnail]) -> dict[str, Any]:
    return {
        "id": checked.clip.id,
        "split": checked.clip.split or "no split",
        "media": checked.media,
        "bars": Markup(coverage_bars(checked)),
        "pictures": [(each.caption, b64encode(each.jpeg).decode("ascii")) for each in images],
        "notes": about,
    }


def _clip(checked: Checked, about: Sequence[Note]) -> dict[str, Any]:
    labels, media, crops = checked.labels, checked.media, checked.crops
    counts = {severity: sum(note.severity == severity for note in about) for severity in SEVERITIES}
    covered = media.frames - crops.missing if media and crops else 0
    return {
        "id": checked.clip.id,
        "split": checked.clip.split or "-",
        "length": f"{media.duration:.1f} s" if media else "unreadable",
        "counts": [(severity, count) for severity, count in counts.items() if count],
        "bars": Markup(coverage_bars(checked)),
        "annotated": _percent(labels.annotated, labels.frames) if labels else "-",
        "cropped": _percent(covered, media.frames) if media and crops else "-",
        "spreads": _spreads(describe(labels.stats) if labels else {}),
    }


def label_map(stats: LabelStats, title: str) -> str:
    """Density of labelled frames over valence and arousal, with the name and the share of each region."""
    width, height = LEFT + SIDE + 12, ABOVE + SIDE + BELOW
    parts = [f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<rect class="frame" x="{LEFT}" y="{ABOVE}" width="{SIDE}" height="{SIDE}"/>')
    opacity = np.sqrt(stats.density / max(int(stats.density.max()), 1))
    edge, third = SIDE / CELLS, SIDE / 3
    for v, a in np.argwhere(stats.density):
        x, y, shown = LEFT + v * edge, ABOVE + SIDE - (a + 1) * edge, max(0.06, float(opacity[v, a]))
        square = f'x="{x:g}" y="{y:g}" width="{edge:g}" height="{edge:g}"'
        parts.append(f'<rect class="cell" {square} fill-opacity="{shown:.2f}"/>')
    for border in (-BORDER, BORDER):
        at = (1 + border) * SIDE / 2
        parts.append(f'<path class="border" d="M{LEFT + at:g} {ABOVE}v{SIDE}M{LEFT} {ABOVE + at:g}h{SIDE}"/>')
    for region, (name, share) in enumerate(zip(REGION_NAMES, occupancy(stats) or [0.0] * 9, strict=True)):
        x, y = LEFT + (region // 3 + 0.5) * third, ABOVE + SIDE - (region % 3 + 0.5) * third
        for line, text in enumerate(name.split(", ")):
            parts.append(f'<text class="word" x="{x:g}" y="{y - 18 + 14 * line:g}" text-anchor="middle">{text}</text>')
        parts.append(f'<text class="share" x="{x:g}" y="{y + 15:g}" text-anchor="middle">{share:.1%}</text>')
    for value in (-1, 0, 1):
        x, y = LEFT + (value + 1) * SIDE / 2, ABOVE + (1 - value) * SIDE / 2
        parts.append(f'<text class="tick" x="{x:g}" y="{ABOVE + SIDE + 16}" text-anchor="middle">{value}</text>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end">{value}</text>')
    middle, left = LEFT + SIDE / 2, ABOVE + SIDE / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">valence</text>')
    parts.append(f'<text class="tick" transform="translate(13 {left}) rotate(-90)" text-anchor="middle">arousal</text>')
    return "".join([*parts, "</svg>"])


def distribution(stats: Mapping[str, LabelStats], dimension: int, title: str) -> str:
    """The share of frames over the values of one dimension (0 valence, 1 arousal), a line for every split."""
    counts = {name: each.density.sum(1 - dimension) for name, each in stats.items()}
    shares = {name: each / each.sum() for name, each in counts.items() if each.sum()}
    top = max((float(each.max()) for each in shares.values()), default=1.0)
    width, height = LEFT + PLOT_WIDTH + 12, ABOVE + PLOT_HEIGHT + BELOW
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    base = ABOVE + PLOT_HEIGHT
    for value in (-1, -0.5, 0, 0.5, 1):
        x = LEFT + (value + 1) * PLOT_WIDTH / 2
        parts.append(f'<path class="grid" d="M{x:g} {ABOVE}V{base}"/>')
        parts.append(f'<text class="tick" x="{x:g}" y="{base + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path class="grid" d="M{LEFT} {base}h{PLOT_WIDTH}"/>')
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{ABOVE + 9}" text-anchor="end">{top:.0%}</text>')
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{base + 4}" text-anchor="end">0</text>')
    step = PLOT_WIDTH / CELLS
    for name, share in shares.items():
        heights = base - share / top * PLOT_HEIGHT
        path = f"M{LEFT} {base}" + "".join(f"V{y:.1f}h{step:g}" for y in heights) + f"V{base}"
        parts.append(f'<path class="line {escape(name)}" d="{path}"><title>{escape(name)}</title></path>')
    middle = LEFT + PLOT_WIDTH / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>')
    return "".join([*parts, "</svg>"])


def coverage_bars(checked: Checked) -> str:
    """Coverage of labels, crops and audio along a clip; a thin line for missing tracks."""
    tracks = (
        ("labels", checked.labels.coverage if checked.labels else b""),
        ("crops", checked.crops.coverage if checked.crops else b""),
        ("audio", _audio_coverage(checked)),
    )
    height = len(tracks) * (TRACK + GAP) - GAP
    shares = [f"{sum(levels) / (255 * len(levels)):.0%}" if levels else "none" for _, levels in tracks]
    title = escape("; ".join(f"{name}: {share}" for (name, _), share in zip(tracks, shares, strict=True)))
    parts = [f'<svg class="strip" viewBox="0 0 {BINS} {height}" preserveAspectRatio="none" role="img">']
    parts.append(f"<title>{title}</title>")
    for k, (_, levels) in enumerate(tracks):
        parts += _track(levels, k * (TRACK + GAP))
    return "".join([*parts, "</svg>"])


def _audio_coverage(checked: Checked) -> bytes:
    media = checked.media
    if media is None:
        return b""
    if media.audio in ("none", "unreadable"):
        return bytes(BINS)
    start, end = media.audio_span or (0.0, media.duration)
    middles = (np.arange(BINS) + 0.5) * (media.duration / BINS)
    level = 128 if media.audio == "silent" else 255
    return bytes(np.where((middles >= start) & (middles < end), level, 0).astype(np.uint8))


def _track(levels: bytes, top: int) -> Iterator[str]:
    """Yield paths of complete, partial and missing intervals; missing ones are lower, to be visible without colour."""
    if not levels:
        yield f'<path class="nothing" d="M0 {top + TRACK / 2:g}h{BINS}"/>'
        return
    values = np.frombuffer(levels, np.uint8)
    kind = np.where(values == 255, 2, np.where(values == 0, 0, 1))
    edges = np.flatnonzero(np.diff(kind, prepend=-1, append=-1))
    paths: dict[str, list[str]] = {"there": [], "part": [], "missing": []}
    for first, stop in pairwise(edges):
        name = ("missing", "part", "there")[int(kind[first])]
        y, h = (top + TRACK / 2, TRACK / 2) if name == "missing" else (top, TRACK)
        paths[name].append(f"M{first} {y:g}h{stop - first}v{h:g}h-{stop - first}z")
    for name, drawn in paths.items():
        if drawn:
            yield f'<path class="{name}" d="{"".join(drawn)}"/>'
