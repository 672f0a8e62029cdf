"""Layout `recola`: RECOLA as the AVEC 2015 and 2016 challenges gave it out.

    [*/]arousal/<name>.arff  [*/]valence/<name>.arff     gold standard, or .csv separated by semicolons
    recordings_video/<name>.mp4   recordings_audio/<name>.wav

`detect` looks, down to four folders below the root, for a folder named `arousal` or `valence` whose first table names
the field GoldStandard: features and the ratings of single raters stand in folders of the same names and are not
labels. Video and sound may stand in any folder. Names that begin with train_, dev_ or test_ say the split; for others
(P16, P17 ...) ROOT/splits.csv (`name,split`) can.

RECOLA's gold standard: one file per dimension and recording, as ARFF or as a table separated by semicolons.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vaflow.datasets import text
from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import head
from vaflow.datasets.labels import Trace
from vaflow.datasets.recordings import DIMENSIONS, Found, make_clips, recordings, split_of, survey
from vaflow.datasets.text import Problems

_EXPECTED = (
    "the fields instance name, frameTime (seconds) and GoldStandard (in [-1, 1]), declared by '@attribute' lines "
    "with '@data' after them (.arff), or by a header separated by semicolons (.csv)"
)
_TIME, _GOLD = "frametime", "goldstandard"


def read_recola(path: Path) -> Trace:
    """One dimension of one recording, a row every 0.04 s. Fields other than time and gold standard are ignored.

    Raises:
        DataError: with every problem and its lines.
    """
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, _EXPECTED, "an empty file")
    arff = lines[0].lstrip().startswith(("@", "%"))
    fields, first, separator = _arff_head(lines) if arff else (text.split(lines[0], ";"), 2, ";")
    names = ["".join(field.lower().replace("_", " ").split()) for field in fields]
    if names.count(_TIME) != 1 or names.count(_GOLD) != 1:
        raise text.refuse(path, _EXPECTED, f"the fields {', '.join(fields)[:80]!r}")
    stands, values = [], []
    for number, cells in text.rows(lines, len(names), problems, first=first, separator=separator):
        stands.append((number, cells[names.index(_TIME)]))
        values.append(text.value(cells[names.index(_GOLD)], number, problems, text.NOT_A_NUMBER))
    time = text.times(stands, problems)
    if problems:
        raise text.refuse(path, _EXPECTED, problems)
    if not values:
        raise text.refuse(path, _EXPECTED, "no rows")
    return Trace(time, np.array(values, np.float32))


def _arff_head(lines: Sequence[str]) -> tuple[list[str], int, str]:
    """Names of the attributes, the (1-based) line of the first row, and what separates cells."""
    fields = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        keyword = words[0].lower() if words else ""
        if keyword == "@attribute" and len(words) > 1:
            fields.append(words[1].strip("'\""))
        elif keyword == "@data":
            first = number + 1
            while first <= len(lines) and not lines[first - 1].strip():
                first += 1
            return fields, first, ","
    return fields, len(lines) + 1, ","


LOOKS_FOR = "folders arousal/ and valence/ of gold standard files (.arff, or .csv with the field GoldStandard)"


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout, or None."""
    labels = _labels(survey(root, media=False))
    return f"{labels[0][1].relative_to(root)} is a gold standard" if labels else None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    found = survey(root)
    all_recordings = recordings(found, _labels(found))
    return make_clips(root, all_recordings, "recola", {one.name: split_of(one.name) for one in all_recordings})


def _labels(found: Found) -> list[tuple[str, Path]]:
    return [
        (folder.name.lower(), folder / name)
        for folder, tables in found.tables
        if folder.name.lower() in DIMENSIONS and _is_gold(folder / tables[0])
        for name in tables
    ]


def _is_gold(path: Path) -> bool:
    return "goldstandard" in "".join(head(path).lower().replace("_", " ").split())
