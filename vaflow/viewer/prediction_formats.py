"""Predictions for other programs: Parquet, ELAN (.eaf), Praat TextGrid, and a CSV with one row per clip.

ELAN and Praat hold intervals: the tiers `valence` and `arousal` are means over steps of equal length, the tier `region`
has one interval per run of equal regions. Names from files are escaped as each format requires.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from vaflow.datasets.files import below
from vaflow.encoders.prompts import REGION_NAMES, REGIONS
from vaflow.errors import UsageError, examples, explain, visible
from vaflow.files import write_file
from vaflow.timeline import median_interval
from vaflow.train.metrics import region_of
from vaflow.viewer import (
    DIMENSIONS,
    PredictedClip,
    Predictions,
    PredictionSet,
    find_predictions,
    read_predictions,
)

if TYPE_CHECKING:
    import pyarrow

STEP = 0.5  # seconds
Interval = tuple[float, float, str]  # start and end in seconds, text
Tiers = Mapping[str, Sequence[Interval]]
Files = Iterator[tuple[Path, bytes]]  # a file, and its content
EXPORTED = "exported.json"  # digests of the files of an export

EAF_SCHEMA = "http://www.mpi.nl/tools/elan/EAFv3.0.xsd"
XSI = "http://www.w3.org/2001/XMLSchema-instance"
_FORMULA = re.compile(r"[=+\-@](?![\w.-]*$)")  # a spreadsheet would evaluate such text; "-abc" is an ordinary video id


def export_predictions(path: Path, out: Path, formats: Sequence[str], step: float = STEP) -> list[Path]:
    """Write predictions in other formats; returns the files.

    Args:
        path: a run, a folder of predictions, or one prediction CSV.
        out: made if missing. Clips of a run are written to one folder per split.
        formats: keys of `FORMATS`.
        step: length of the intervals in ELAN and Praat files, in seconds.

    Raises:
        UsageError: an unknown format, no predictions, pyarrow is missing, or a file would be replaced that no export
            wrote, or that was changed since, such as an annotation in ELAN.
        CorruptError: a prediction file is damaged.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(explain("Unknown format", got=name, choices=FORMATS))
    if not step > 0:
        raise UsageError(explain("--step must be positive", got=step))
    predictions = find_predictions(path)
    if "parquet" in formats:
        require_pyarrow()
    files = {file: text for name in dict.fromkeys(formats) for file, text in FORMATS[name](predictions, out, step)}
    _write_files(out, files)
    return list(files)


def _write_files(out: Path, files: Mapping[Path, bytes]) -> None:
    """Write the files of an export, and their digests beside them; nothing if one of them was not exported before.

    Raises:
        UsageError: a file would be replaced that no export wrote, or that was changed since.
    """
    record = out / EXPORTED
    known: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):
        read = json.loads(record.read_text("utf-8"))
        known = {name: list(map(str, digests)) for name, digests in read.items()} if isinstance(read, dict) else {}
    new = {file.relative_to(out).as_posix(): _digest(content) for file, content in files.items()}
    changed = []
    for name, digest in new.items():
        existing = out / name
        if existing.is_file() and _digest(existing.read_bytes()) not in (digest, *known.get(name, ())):
            changed.append(name)
    if changed:
        problem = f"{out} holds files that no export wrote, or that were changed since"
        remedy = "Choose another directory, or remove them"
        raise UsageError(explain(problem, got=examples(changed), remedy=remedy))
    # Old and new digests first, so that an interrupted export can be repeated.
    both = known | {name: [*known.get(name, ()), digest] for name, digest in new.items()}
    write_file(record, json.dumps(both, indent=1) + "\n")
    for file, content in files.items():
        write_file(file, content)
    write_file(record, json.dumps(known | {name: [digest] for name, digest in new.items()}, indent=1) + "\n")


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def require_pyarrow() -> None:
    """Raise a UsageError unless pyarrow is installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        remedy = "From a clone: pip install -e '.[parquet]'"
        raise UsageError(explain("Parquet files require pyarrow", got=error, remedy=remedy)) from error


def parquet_file(predictions: PredictionSet, out: Path, step: float) -> Files:
    """`predictions.parquet`: the rows of all clips, with the columns clip and split before those of the CSV files."""
    import pyarrow
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    def table(clip: PredictedClip) -> "pyarrow.Table":
        read_predictions(clip.csv)  # checked
        columns = arrow_csv.read_csv(clip.csv)
        for position, text in enumerate((clip.item, clip.split)):
            values = pyarrow.array([visible(text)] * len(columns), pyarrow.string())
            columns = columns.add_column(position, ("clip", "split")[position], values)
        return columns

    whole = pyarrow.concat_tables([table(clip) for clip in predictions.clips], promote_options="permissive")
    content = pyarrow.BufferOutputStream()
    parquet.write_table(whole, content)
    yield out / "predictions.parquet", content.getvalue().to_pybytes()


def clip_rows(predictions: PredictionSet, out: Path, step: float) -> Files:
    """`clips.csv`: a row per clip with mean, deviation and range of both dimensions and the commonest region."""
    statistics: dict[str, Callable[..., Any]] = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    rows: list[dict[str, object]] = []
    for clip in predictions.clips:
        table = read_predictions(clip.csv)
        row: dict[str, object] = {"clip": _cell(clip.item), "split": _cell(clip.split), "frames": len(table.time)}
        row["seconds"] = f"{_end(table) - table.time[0]:.3f}"
        for k, name in enumerate(DIMENSIONS):
            row |= {f"{name}_{what}": f"{function(table.va[:, k]):.6f}" for what, function in statistics.items()}
        shares = np.bincount(_regions(clip, table, predictions), minlength=len(REGION_NAMES)) / len(table.time)
        row |= {"region": REGION_NAMES[int(shares.argmax())], "region_share": f"{shares.max():.4f}"}
        for name, mask in (("face", table.face), ("audio", table.audio), ("far_from_training", table.far)):
            row[f"{name}_share"] = "" if mask is None else f"{mask.mean():.4f}"
        for k, name in enumerate(DIMENSIONS):
            row[f"{name}_predicted_std"] = "" if table.std is None else f"{table.std[:, k].mean():.6f}"
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    yield out / "clips.csv", text.getvalue().encode()


def _cell(text: str) -> str:
    """A name in a CSV file that a spreadsheet may open: a formula gets a leading apostrophe."""
    shown = visible(text)
    return f"'{shown}" if _FORMULA.match(shown) else shown


def tier_files(
    suffix: str, text: Callable[[Tiers, PredictedClip], str], predictions: PredictionSet, out: Path, step: float
) -> Files:
    """One file per clip, `<clip>.<suffix>`, with the tiers as `text` writes them."""
    for clip in predictions.clips:
        table = read_predictions(clip.csv)
        file = below(out, "/".join(filter(None, [clip.split, f"{clip.item}.{suffix}"])))
        yield file, text(tiers_of(table, _regions(clip, table, predictions), step), clip).encode()


def _regions(clip: PredictedClip, table: Predictions, predictions: PredictionSet) -> Any:
    """[T] region indices: the column `region` of the CSV file, or the regions with the nearest centers without it."""
    index = {"_".join(levels): k for k, levels in enumerate(REGIONS)}
    with clip.csv.open(encoding="utf-8", newline="") as file:
        regions = [index.get(row.get("region") or "", -1) for row in csv.DictReader(file)]
    if len(regions) == len(table.time) and min(regions) >= 0:
        return np.array(regions)
    return region_of(table.va, predictions.centers)


def _end(table: Predictions) -> float:
    return float(table.time[-1] + median_interval(table.time))


def tiers_of(table: Predictions, region: Any, step: float) -> dict[str, list[Interval]]:
    """The tiers valence, arousal and region of a clip; intervals begin and end at times of frames, without gaps."""
    time = np.append(table.time, _end(table))

    def cut(number: Any, text: Callable[[slice], str]) -> list[Interval]:
        """One interval per run of equal numbers [T]; `text` gets its rows."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]])
        rows = [slice(int(a), int(b)) for a, b in pairwise(starts)]
        return [(float(time[r.start]), float(time[r.stop]), text(r)) for r in rows if time[r.stop] > time[r.start]]

    steps = np.floor((table.time - table.time[0]) / step + 1e-9)
    tiers = {
        name: cut(steps, lambda rows, k=k: f"{table.va[rows, k].mean():+.3f}")  # type: ignore[misc]
        for k, name in enumerate(DIMENSIONS)
    }
    return tiers | {"region": cut(region, lambda rows: REGION_NAMES[int(region[rows.start])])}


def textgrid_text(tiers: Tiers, clip: PredictedClip) -> str:
    """A Praat TextGrid in the long text format.

    Source: https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html; quotes in texts are doubled. An interval
    tier must span the whole grid, which starts at 0.
    """
    end = max(intervals[-1][1] for intervals in tiers.values())
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0 ", f"xmax = {end:.6f} "]
    lines += ["tiers? <exists> ", f"size = {len(tiers)} ", "item []: "]
    for number, (name, given) in enumerate(tiers.items(), 1):
        intervals = [*([(0.0, given[0][0], "")] if given[0][0] > 0 else []), *given]
        lines += [f"    item [{number}]:", '        class = "IntervalTier" ', f"        name = {_quoted(name)} "]
        lines += ["        xmin = 0 ", f"        xmax = {end:.6f} ", f"        intervals: size = {len(intervals)} "]
        for k, (start, stop, text) in enumerate(intervals, 1):
            lines += [f"        intervals [{k}]:", f"            xmin = {start:.6f} "]
            lines += [f"            xmax = {stop:.6f} ", f"            text = {_quoted(text)} "]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + visible(text).replace('"', '""') + '"'


def eaf_text(tiers: Tiers, clip: PredictedClip) -> str:
    """An ELAN annotation document, EAF 3.0. Source: https://www.mpi.nl/tools/elan/EAFv3.0.xsd (order of elements)."""
    root = ElementTree.Element(
        "ANNOTATION_DOCUMENT",
        {
            "AUTHOR": "vaflow",
            "DATE": datetime.now(UTC).isoformat(timespec="seconds"),
            "FORMAT": "3.0",
            "VERSION": "3.0",
            f"{{{XSI}}}noNamespaceSchemaLocation": EAF_SCHEMA,
        },
    )
    header = ElementTree.SubElement(root, "HEADER", MEDIA_FILE="", TIME_UNITS="milliseconds")
    media = clip.source.get("media")
    if isinstance(media, str) and Path(media).is_absolute():
        kind = {".mp4": "video/mp4", ".wav": "audio/x-wav"}.get(Path(media).suffix.lower(), "video/*")
        ElementTree.SubElement(header, "MEDIA_DESCRIPTOR", MEDIA_URL=Path(media).as_uri(), MIME_TYPE=kind)
    ElementTree.SubElement(header, "PROPERTY", NAME="clip").text = visible(clip.item)
    times = sorted({_ms(t) for intervals in tiers.values() for start, stop, _ in intervals for t in (start, stop)})
    slots = {time: f"ts{number}" for number, time in enumerate(times, 1)}
    order = ElementTree.SubElement(root, "TIME_ORDER")
    for time, slot in slots.items():
        ElementTree.SubElement(order, "TIME_SLOT", TIME_SLOT_ID=slot, TIME_VALUE=str(time))
    number = 0
    for name, intervals in tiers.items():
        tier = ElementTree.SubElement(root, "TIER", LINGUISTIC_TYPE_REF="default-lt", TIER_ID=visible(name))
        for start, stop, text in intervals:
            if _ms(start) == _ms(stop):
                continue
            number += 1
            edges = {"TIME_SLOT_REF1": slots[_ms(start)], "TIME_SLOT_REF2": slots[_ms(stop)]}
            holder = ElementTree.SubElement(tier, "ANNOTATION")
            annotation = ElementTree.SubElement(
                holder, "ALIGNABLE_ANNOTATION", {"ANNOTATION_ID": f"a{number}", **edges}
            )
            ElementTree.SubElement(annotation, "ANNOTATION_VALUE").text = visible(text)
    ElementTree.SubElement(
        root, "LINGUISTIC_TYPE", GRAPHIC_REFERENCES="false", LINGUISTIC_TYPE_ID="default-lt", TIME_ALIGNABLE="true"
    )
    for stereotype, description in _CONSTRAINTS:
        ElementTree.SubElement(root, "CONSTRAINT", DESCRIPTION=description, STEREOTYPE=stereotype)
    ElementTree.indent(root, "    ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


_CONSTRAINTS: Iterable[tuple[str, str]] = (  # as ELAN writes them into every file
    (
        "Time_Subdivision",
        "Time subdivision of parent annotation's time interval, no time gaps allowed within this interval",
    ),
    (
        "Symbolic_Subdivision",
        "Symbolic subdivision of a parent annotation. Annotations refering to the same parent are ordered",
    ),
    ("Symbolic_Association", "1-1 association with a parent annotation"),
    ("Included_In", "Time alignable annotations within the parent annotation's time interval, gaps are allowed"),
)

FORMATS: Mapping[str, Callable[[PredictionSet, Path, float], Files]] = {
    "csv": clip_rows,
    "eaf": partial(tier_files, "eaf", eaf_text),
    "parquet": parquet_file,
    "textgrid": partial(tier_files, "TextGrid", textgrid_text),
}
