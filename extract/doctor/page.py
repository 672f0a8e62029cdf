"""`vaflow check --html`: what a check found, as one page with pictures. Nothing is fetched; all text is escaped."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest

from vaflow.datasets.dataset import SEVERITIES, Note
from vaflow.encoders.prompts import load_prompts
from vaflow.extract.doctor.figures import distribution, label_map, strips
from vaflow.extract.doctor.pictures import Thumbnail
from vaflow.extract.doctor.report import Checked, Kind, Report, Summary, describe
from vaflow.extract.doctor.style import STYLE

PICTURED = 24  # clips with pictures
LISTED = 500  # clips in the table
NAMED = 200  # findings of a kind

Pictures = Mapping[str, Sequence[Thumbnail]]  # by clip


def html_page(report: Report, pictures: Pictures) -> str:
    """The whole page.

    Args:
        report: the check's result.
        pictures: of the clips that `pictured` chose.
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
    """Clips worth a picture: an example of every kind of finding in turn, errors first, then the next of every kind."""
    by_id = {checked.clip.id: checked for checked in report.checked}
    ranks = zip_longest(*([item for item in kind.items if item in by_id] for kind in report.kinds()))
    names = dict.fromkeys(name for rank in ranks for name in rank if name is not None)
    return [by_id[name] for name in list(names)[:limit]]


def _tiles(report: Report, total: Summary) -> str:
    covered = total.crop_frames - total.crops_missing
    tiles = [
        *((str(report.count(severity)), f"{severity}s", severity) for severity in SEVERITIES),
        (f"{total.usable} of {total.clips}", "clips have a usable video", ""),
        (_length(total.seconds), f"{total.frames:,} frames of {total.groups} videos", ""),
        (_percent(total.annotated, total.label_frames), "of labelled clips' frames are annotated", ""),
        (_percent(covered, total.crop_frames), "of their frames have a crop", ""),
    ]
    shown = (f'<div class="tile {name}"><b>{escape(big)}</b><span>{small}</span></div>' for big, small, name in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _badge(severity: str, text: str) -> str:
    return f'<span class="badge {escape(severity)}">{escape(text)}</span>'


def _kind(kind: Kind) -> str:
    notes = "".join(f"<li>{_about(note)}</li>" for note in kind.notes[:NAMED])
    more = len(kind.notes) - NAMED
    rest = f"<li>... and {more} more: see <code>vaflow check --json</code></li>" if more > 0 else ""
    remedies = "".join(f"<p>&rarr; {escape(remedy)}.</p>" for remedy in kind.remedies)
    cost = f'<p class="cost">What it costs: {escape(kind.cost)}.</p>' if kind.cost else ""
    opened = " open" if kind.severity == "error" else ""
    return f"""<details class="kind"{opened}>
<summary>{_badge(kind.severity, kind.severity)} <b>{escape(kind.code)}</b> <span class="count">{len(kind.notes)}</span>
<span class="soft">{escape(_first_words(kind))}</span></summary>
{remedies}{cost}<ul>{notes}{rest}</ul>
</details>
"""


def _first_words(kind: Kind) -> str:
    if not kind.items:
        return kind.notes[0].message
    return ", ".join(kind.items[:4]) + (" ..." if len(kind.items) > 4 else "")


def _about(note: Note) -> str:
    return f"<b>{escape(note.item)}</b>: {escape(note.message)}" if note.item else escape(note.message)


def _splits(splits: Mapping[str, Summary], total: Summary) -> str:
    head = ("split", "clips", "usable", "videos", "hours", "frames", "annotated", "with crop", "valence", "arousal")
    rows = [*splits.items(), *([("all", total)] if len(splits) > 1 else [])]
    return _table(head, ((name, *_split_cells(summary)) for name, summary in rows))


def _split_cells(summary: Summary) -> tuple[str, ...]:
    covered = summary.crop_frames - summary.crops_missing
    return (
        str(summary.clips),
        str(summary.usable),
        str(summary.groups),
        f"{summary.seconds / 3600:.2f}",
        f"{summary.frames:,}",
        _percent(summary.annotated, summary.label_frames),
        _percent(covered, summary.crop_frames),
        *_spreads(describe(summary.stats)),
    )


def _spreads(described: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """Mean and standard deviation of valence and of arousal."""
    valence, arousal = (described.get(name) for name in ("valence", "arousal"))
    return _spread(valence), _spread(arousal)


def _spread(row: Mapping[str, float] | None) -> str:
    return f"{row['mean']:.2f} ± {row['std']:.2f}" if row else "-"


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
    words = tuple(text.partition(",")[0] for text in load_prompts().descriptions)
    maps = "".join(
        f"<figure><figcaption>{escape(name)}: {int(each.regions.sum()):,} frames with both labels</figcaption>"
        f"{label_map(each, words, f'Labels of {name} over valence and arousal')}</figure>"
        for name, each in stats.items()
        if each.regions.sum()
    )
    legend = "".join(f'<span><i class="key {escape(name)}"></i>{escape(name)}</span>' for name in stats)
    plots = "".join(distribution(stats, k, name) for k, name in enumerate(("valence", "arousal")))
    return f"""<section><h2>Where the labels lie</h2>
<p class="soft">Labelled frames over the nine regions of the prompt head (thirds of the range); strong colour: many.</p>
<div class="figures">{maps}</div>
<h3>Share of frames</h3><p class="legend">{legend}</p>
<div class="figures">{plots}</div>
</section>"""


_STRIP_LEGEND = """<p class="legend">Three bands along the clip's time: labels, crops, sound.
<span><i class="key there"></i>there</span><span><i class="key part"></i>in part, or silent</span>
<span><i class="key missing"></i>missing</span><span><i class="key nothing"></i>the clip has no such part</span></p>"""


def _looked_at(report: Report, pictures: Pictures) -> str:
    about = _by_item(report)
    cards = "".join(_card(c, about[c.clip.id], pictures.get(c.clip.id, ())) for c in pictured(report))
    if not cards:
        return ""
    return f"<section><h2>Clips worth a look</h2>{_STRIP_LEGEND}<div class='cards'>{cards}</div></section>"


def _by_item(report: Report) -> dict[str, list[Note]]:
    """Every clip's findings, worst first; a leak is about every clip of its source video."""
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
        f'<figure><img alt="" src="data:image/jpeg;base64,{b64encode(each.jpeg).decode("ascii")}">'
        f"<figcaption>{escape(each.caption)}</figcaption></figure>"
        for each in pictures
    )
    length = f", {checked.media.duration:.1f} s, {checked.media.frames:,} frames" if checked.media else ""
    return f"""<article>
<h3>{escape(checked.clip.id)} <span class="soft">{escape(checked.clip.split or "no split")}{length}</span></h3>
{strips(checked)}
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
        "labels, crops, sound",
        "annotated",
        "with crop",
        "valence",
        "arousal",
    )
    left_out = len(ordered) - LISTED
    note = f"The first {LISTED} of {len(ordered)}; the JSON document has all." if left_out > 0 else ""
    rows = (_clip_cells(checked, about[checked.clip.id]) for checked in ordered[:LISTED])
    return f"""<section class="clips"><h2>Every clip</h2>
<p class="soft">Valence and arousal: mean ± standard deviation of the clip's annotated frames. {note}</p>{_STRIP_LEGEND}
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
        strips(checked),
        _percent(labels.annotated, labels.frames) if labels else "-",
        _percent(covered, media.frames) if media and crops else "-",
        *_spreads(describe(labels.stats) if labels else {}),
    )
