"""Figures of the page of a check, as inline SVG: density and distribution of labels, coverage of each clip.

The page's style sheet sets the colours, so that they follow light, dark and print. Position and text repeat what
colour shows.
"""

from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise

import numpy as np

from vaflow.extract.doctor.facts import BINS, CELLS, LabelStats
from vaflow.extract.doctor.report import Checked, occupancy
from vaflow.regions import REGION_NAMES

SIDE, LEFT, BELOW, ABOVE = 360, 46, 40, 8  # pixels of the label map: the square, its margins
PLOT_WIDTH, PLOT_HEIGHT = 420, 120
TRACK, GAP = 8, 3  # pixels: the height of a bar, and the space between two


def label_map(stats: LabelStats, title: str) -> str:
    """Density of labelled frames over valence and arousal, with the name and the share of each region.

    Args:
        stats: sums over the clips.
        title: text for screen readers.
    """
    width, height = LEFT + SIDE + 12, ABOVE + SIDE + BELOW
    parts = [f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<rect class="frame" x="{LEFT}" y="{ABOVE}" width="{SIDE}" height="{SIDE}"/>')
    opacity = np.sqrt(stats.density / max(int(stats.density.max()), 1))
    edge, third = SIDE / CELLS, SIDE / 3
    for v, a in np.argwhere(stats.density):
        x, y, shown = LEFT + v * edge, ABOVE + SIDE - (a + 1) * edge, max(0.06, float(opacity[v, a]))
        square = f'x="{x:g}" y="{y:g}" width="{edge:g}" height="{edge:g}"'
        parts.append(f'<rect class="cell" {square} fill-opacity="{shown:.2f}"/>')
    for k in (1, 2):
        at = k * third
        parts.append(f'<path class="third" d="M{LEFT + at:g} {ABOVE}v{SIDE}M{LEFT} {ABOVE + at:g}h{SIDE}"/>')
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
    for name, each in shares.items():
        heights = base - each / top * PLOT_HEIGHT
        path = f"M{LEFT} {base}" + "".join(f"V{y:.1f}h{step:g}" for y in heights) + f"V{base}"
        parts.append(f'<path class="line {escape(name)}" d="{path}"><title>{escape(name)}</title></path>')
    middle = LEFT + PLOT_WIDTH / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>')
    return "".join([*parts, "</svg>"])


def coverage_bars(checked: Checked) -> str:
    """Coverage of labels, crops and audio along a clip; a thin line for a part that it does not have."""
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
    """Yield paths of complete, partial and missing intervals; missing ones are lower, to be told without colour."""
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
