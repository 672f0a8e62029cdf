"""The page of `vaflow check --html`: one file with figures and images; nothing is fetched and all text is escaped."""

import html
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

from vaflow.datasets.clip import SEVERITIES, Note
from vaflow.errors import visible
from vaflow.extract.doctor.figures import coverage_bars, distribution, label_map
from vaflow.extract.doctor.report import Checked, Kind, Report, Summary, describe
from vaflow.extract.doctor.thumbnails import Thumbnail

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f7f8f9; --text: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d9;
  --there: #3c8fc4; --part: #a9d0ea; --missing: #e39a1c; --error: #b3261e; --warning: #8a5200; --note: #5c5c5c;
  --train: #0072b2; --val: #c04f00; --test: #6b6b6b; --none: #7a5aa0; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1e2125; --text: #e8e8e8;
  --soft: #a9a9a9; --line: #3a3d41; --there: #4a9fd4; --part: #2c5a78; --missing: #f0b44b; --error: #ff8a80;
  --warning: #f0c24b; --note: #a9a9a9; --train: #5bb4e5; --val: #f0a05a; --test: #9a9a9a; --none: #b79be0; } }
@page { size: landscape; margin: 12mm; }
@media print { :root { color-scheme: light; } body { max-width: none; margin: 0; }
  article, figure { break-inside: avoid; } .wide { overflow: visible; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
ul { padding-left: 1.2rem; margin: .4rem 0; } p { margin: .2rem 0 .5rem; }
.soft { color: var(--soft); font-weight: 400; } .wide { overflow-x: auto; overflow-wrap: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; } .tile span { font-size: .82rem; color: var(--soft); }
.tile.error b { color: var(--error); } .tile.warning b { color: var(--warning); }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: .3rem; padding: 0 .4em;
  font-size: .78rem; white-space: nowrap; } .badge.error { color: var(--error); font-weight: 700; }
.badge.warning { color: var(--warning); } .badge.note { color: var(--note); }
.kind { border-bottom: 1px solid var(--line); padding: .35rem 0; } .kind > :not(summary) { margin-left: 1.1rem; }
.kind summary { cursor: pointer; } .kind .count { background: var(--card); border-radius: 1em; padding: 0 .5em; }
.cost { color: var(--warning); } .kind li { font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--soft); }
th:first-child { text-align: left; font-weight: 400; max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
.clips td:nth-child(5) { width: 34%; min-width: 14rem; } .clips :is(th, td):nth-child(n + 4):nth-child(-n + 5) {
  text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
.figures figcaption { font-weight: 600; font-size: .9rem; }
svg { font: 12px system-ui, sans-serif; } svg.map { width: 400px; max-width: 100%; }
svg.plot { width: 480px; max-width: 100%; } .tick { fill: var(--soft); } .grid { stroke: var(--line); fill: none; }
.frame { fill: none; stroke: var(--line); } .cell { fill: var(--there); } .third { stroke: var(--soft); fill: none;
  stroke-dasharray: 3 3; stroke-width: .7; }
.word, .share { fill: var(--text); paint-order: stroke; stroke: var(--back); stroke-width: 3px;
  stroke-linejoin: round; }
.share { font-size: 14px; font-weight: 700; }
.line { fill: none; stroke-width: 2; } .line.train { stroke: var(--train); }
.line.val { stroke: var(--val); stroke-dasharray: 5 2; } .line.test { stroke: var(--test); stroke-dasharray: 2 2; }
.line.none { stroke: var(--none); stroke-dasharray: 8 2 2 2; }
.legend { color: var(--soft); font-size: .86rem; } .legend span { margin-right: 1.1rem; white-space: nowrap; }
.key { display: inline-block; width: 1.6em; height: .7em; margin-right: .35em; }
.key.train { border-top: 2px solid var(--train); } .key.val { border-top: 2px dashed var(--val); }
.key.test { border-top: 2px dotted var(--test); } .key.none { border-top: 2px dashed var(--none); }
.key.there { background: var(--there); } .key.part { background: var(--part); }
.key.missing { background: var(--missing); height: .35em; }
.key.nothing { border-top: 1px solid var(--line); height: .3em; }
svg.strip { width: 100%; height: 30px; display: block; } .strip .there { fill: var(--there); }
.strip .part { fill: var(--part); } .strip .missing { fill: var(--missing); }
.strip .nothing { stroke: var(--line); stroke-width: 1; fill: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
article svg.strip { margin: .5rem 0; } article li { font-size: .86rem; margin: .15rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } .pictures img { display: block; border-radius: .25rem; }
.pictures figcaption { font-size: .72rem; color: var(--soft); }
"""


PICTURED = 24  # clips with images
LISTED = 500  # clips in the table
NAMED = 200  # findings of a kind

Pictures = Mapping[str, Sequence[Thumbnail]]  # by clip


def escape(text: str) -> str:
    """Text as HTML; characters that would steer a terminal or turn the direction of text are spelt out."""
    return html.escape(visible(text))


def html_page(report: Report, pictures: Pictures) -> str:
    """The whole page.

    Args:
        report: the result of a check.
        pictures: images of the clips that `pictured` chose.
    """
    splits, total = report.splits(), report.total()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Check of {escape(report.root.name)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Check of {escape(report.root.name)}</h1>
<p class="soft">{escape(str(report.root))}, layout {escape(report.layout)}</p>
{_tiles(report, total)}
<section><h2>Findings</h2>
{"".join(_kind(kind) for kind in report.kinds()) or "<p>None.</p>"}
</section>
<section><h2>Splits</h2>
{_splits(splits, total)}
</section>
{_labels(splits)}
{_looked_at(report, pictures)}
{_clips(report)}
</body>
</html>
"""


def pictured(report: Report, limit: int = PICTURED) -> list[Checked]:
    """Clips to show: one of every kind of finding in turn, errors first, then the second of every kind, and so on."""
    by_id = {checked.clip.id: checked for checked in report.checked}
    ranks = zip_longest(*([item for item in kind.items if item in by_id] for kind in report.kinds()))
    names = dict.fromkeys(name for rank in ranks for name in rank if name is not None)
    return [by_id[name] for name in list(names)[:limit]]


def _tiles(report: Report, total: Summary) -> str:
    covered = total.crop_frames - total.crops_missing
    tiles = [
        *((str(report.count(severity)), f"{severity}s", severity) for severity in SEVERITIES),
        (f"{total.usable} of {total.clips}", "clips are usable", ""),
        (f"{total.seconds / 3600:.2f} h", f"{total.frames:,} frames of {total.groups} videos", ""),
        (_percent(total.annotated, total.label_frames), "of labelled clips' frames are annotated", ""),
        (_percent(covered, total.crop_frames), "of their frames have a crop", ""),
    ]
    shown = (f'<div class="tile {name}"><b>{escape(big)}</b><span>{small}</span></div>' for big, small, name in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _badge(severity: str, text: str) -> str:
    return f'<span class="badge {escape(severity)}">{escape(text)}</span>'


def _kind(kind: Kind) -> str:
    named = ((f"<b>{escape(note.item)}</b>: " if note.item else "", note.message) for note in kind.notes[:NAMED])
    notes = "".join(f"<li>{item}{escape(message)}</li>" for item, message in named)
    items = ", ".join(kind.items[:4]) + (" ..." if len(kind.items) > 4 else "")
    more = len(kind.notes) - NAMED
    rest = f"<li>... and {more} more: see <code>vaflow check --json</code></li>" if more > 0 else ""
    remedies = "".join(f"<p>&rarr; {escape(remedy)}.</p>" for remedy in kind.remedies)
    cost = f'<p class="cost">Cost: {escape(kind.cost)}.</p>' if kind.cost else ""
    opened = " open" if kind.severity == "error" else ""
    return f"""<details class="kind"{opened}>
<summary>{_badge(kind.severity, kind.severity)} <b>{escape(kind.code)}</b> <span class="count">{len(kind.notes)}</span>
<span class="soft">{escape(items or kind.notes[0].message)}</span></summary>
{remedies}{cost}<ul>{notes}{rest}</ul>
</details>
"""


def _splits(splits: Mapping[str, Summary], total: Summary) -> str:
    head = ("split", "clips", "usable", "videos", "hours", "frames", "annotated", "with crop", "valence", "arousal")
    rows = [
        (
            name,
            str(summary.clips),
            str(summary.usable),
            str(summary.groups),
            f"{summary.seconds / 3600:.2f}",
            f"{summary.frames:,}",
            _percent(summary.annotated, summary.label_frames),
            _percent(summary.crop_frames - summary.crops_missing, summary.crop_frames),
            *_spreads(describe(summary.stats)),
        )
        for name, summary in [*splits.items(), *([("all", total)] if len(splits) > 1 else [])]
    ]
    return _table(head, rows)


def _spreads(described: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Mean and standard deviation of valence and of arousal."""
    rows = [described.get(name) for name in ("valence", "arousal")]
    return [f"{row['mean']:.2f} ± {row['std']:.2f}" if row else "-" for row in rows]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: Callable[[int], bool] = lambda _: False) -> str:
    """An HTML table, its first column a heading; cells of columns that are `raw` are HTML already."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for first, *cells in rows:
        shown = "".join(f"<td>{cell if raw(k) else escape(cell)}</td>" for k, cell in enumerate(cells, 1))
        body.append(f'<tr><th scope="row">{escape(first)}</th>{shown}</tr>')
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _labels(splits: Mapping[str, Summary]) -> str:
    stats = {name: summary.stats for name, summary in splits.items() if summary.stats.count.sum()}
    if not stats:
        return ""
    maps = "".join(
        f"<figure><figcaption>{escape(name)}: {int(each.regions.sum()):,} frames with both labels</figcaption>"
        f"{label_map(each, f'Labels of {name} over valence and arousal')}</figure>"
        for name, each in stats.items()
        if each.regions.sum()
    )
    legend = "".join(f'<span><i class="key {escape(name)}"></i>{escape(name)}</span>' for name in stats)
    plots = "".join(distribution(stats, k, name) for k, name in enumerate(("valence", "arousal")))
    return f"""<section><h2>Distribution of labels</h2>
<p class="soft">Labelled frames over the nine regions (thirds of the range); a strong colour means many frames.</p>
<div class="figures">{maps}</div>
<h3>Share of frames</h3><p class="legend">{legend}</p>
<div class="figures">{plots}</div>
</section>"""


_COVERAGE_LEGEND = """<p class="legend">Three bars along the clip's time: labels, crops, audio.
<span><i class="key there"></i>present</span><span><i class="key part"></i>in part, or silent</span>
<span><i class="key missing"></i>missing</span><span><i class="key nothing"></i>not part of the clip</span></p>"""


def _looked_at(report: Report, pictures: Pictures) -> str:
    about = _by_item(report)
    cards = "".join(_card(c, about[c.clip.id], pictures.get(c.clip.id, ())) for c in pictured(report))
    if not cards:
        return ""
    return f"<section><h2>Clips with findings</h2>{_COVERAGE_LEGEND}<div class='cards'>{cards}</div></section>"


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


def _card(checked: Checked, about: Sequence[Note], pictures: Sequence[Thumbnail]) -> str:
    notes = "".join(f"<li>{_badge(note.severity, note.code)} {escape(note.message)}</li>" for note in about)
    shown = "".join(
        f'<figure><img alt="{escape(each.caption)}" '
        f'src="data:image/jpeg;base64,{b64encode(each.jpeg).decode("ascii")}">'
        f"<figcaption>{escape(each.caption)}</figcaption></figure>"
        for each in pictures
    )
    length = f", {checked.media.duration:.1f} s, {checked.media.frames:,} frames" if checked.media else ""
    return f"""<article>
<h3>{escape(checked.clip.id)} <span class="soft">{escape(checked.clip.split or "no split")}{length}</span></h3>
{coverage_bars(checked)}
<div class="pictures">{shown}</div>
<ul>{notes}</ul>
</article>"""


def _clips(report: Report) -> str:
    about = _by_item(report)
    worst = {name: min((SEVERITIES.index(note.severity) for note in notes), default=9) for name, notes in about.items()}
    ordered = sorted(report.checked, key=lambda c: (worst[c.clip.id], c.clip.id))
    head = (
        "clip",
        "split",
        "length",
        "findings",
        "labels, crops, audio",
        "annotated",
        "with crop",
        "valence",
        "arousal",
    )
    left_out = len(ordered) - LISTED
    note = f"The first {LISTED} of {len(ordered)}; the JSON document has all." if left_out > 0 else ""
    rows = (_clip_cells(checked, about[checked.clip.id]) for checked in ordered[:LISTED])
    return f"""<section class="clips"><h2>Every clip</h2>
<p class="soft">Valence and arousal: mean ± standard deviation of the clip's annotated frames. {note}</p>
{_COVERAGE_LEGEND}
{_table(head, rows, raw=lambda k: k in (3, 4))}</section>"""


def _clip_cells(checked: Checked, about: Sequence[Note]) -> tuple[str, ...]:
    labels, media, crops = checked.labels, checked.media, checked.crops
    counts = {severity: sum(note.severity == severity for note in about) for severity in SEVERITIES}
    covered = media.frames - crops.missing if media and crops else 0
    return (
        checked.clip.id,
        checked.clip.split or "-",
        f"{media.duration:.1f} s" if media else "unreadable",
        " ".join(_badge(name, f"{count} {name}{'s' * (count != 1)}") for name, count in counts.items() if count),
        coverage_bars(checked),
        _percent(labels.annotated, labels.frames) if labels else "-",
        _percent(covered, media.frames) if media and crops else "-",
        *_spreads(describe(labels.stats) if labels else {}),
    )
