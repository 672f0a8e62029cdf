"""Layout `sewa`: SEWA as the AVEC 2017 to 2019 challenges gave it out.

    [*/]labels/<name>.csv        timestamp; arousal; valence (; liking), both dimensions in one file
    */<name>.mp4 | .avi ...      */<name>.wav

`detect` looks, down to four folders below the root, for a folder whose name begins with `label` and whose first .csv
is separated by semicolons. Video and sound may stand in any folder. Names that begin with Train_, Devel_ or Test_ say
the split; ROOT/splits.csv (`name,split`) wins over them.

SEWA's label files: both dimensions in one table separated by semicolons, with or without a header.
"""

from pathlib import Path

import numpy as np

from vaflow.datasets import text
from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import head
from vaflow.datasets.recordings import Found, make_clips, recordings, split_of, survey
from vaflow.datasets.text import TARGETS, Problems

_EXPECTED = (
    "columns separated by semicolons: instance name (may be left out), timestamp (seconds), arousal, valence, and "
    "liking or nothing; a header may name them"
)
_IN_ORDER = ("timestamp", "arousal", "valence", "liking")


def read_sewa(path: Path) -> Annotation:
    """Arousal and valence every 0.1 s. Without a header the columns are in the order of the challenges' files.

    Raises:
        DataError: with every problem and its lines.
    """
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, _EXPECTED, "an empty file")
    top = text.split(lines[0], ";")
    lower = [cell.lower().replace("_", "") for cell in top]
    if any(target in lower for target in TARGETS):
        names, first = ["timestamp" if cell in ("time", "frametime") else cell for cell in lower], 2
    else:
        names, first = _names(top), 1
    targets = tuple(target for target in TARGETS if target in names)
    if "timestamp" not in names or not targets or len(set(names)) != len(names):
        raise text.refuse(path, _EXPECTED, f"line 1 ({lines[0][:60]!r})")
    stands, values = [], []
    for number, cells in text.rows(lines, len(names), problems, first=first, separator=";"):
        stands.append((number, cells[names.index("timestamp")]))
        found = {t: text.value(cells[names.index(t)], number, problems, text.NOT_A_NUMBER) for t in targets}
        values.append([found.get(target, np.nan) for target in TARGETS])
    time = text.times(stands, problems)
    if problems:
        raise text.refuse(path, _EXPECTED, problems)
    if not values:
        raise text.refuse(path, _EXPECTED, "a header without rows")
    return Annotation(value=np.array(values, np.float32), time=time, targets=targets)


def _names(first_row: list[str]) -> list[str]:
    """What the columns of a file without a header are: a first cell that is no number is the instance's name."""
    name = [] if text.is_number(first_row[0]) else ["name"]
    count = len(first_row) - len(name)
    return [*name, *_IN_ORDER[:count]] if 3 <= count <= len(_IN_ORDER) else []


LOOKS_FOR = "a folder labels/ of .csv files separated by semicolons"

_FEWEST_COLUMNS = 3  # time, arousal, valence


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout, or None."""
    labels = _labels(survey(root, media=False))
    return f"{labels[0][1].relative_to(root)} is a table of labels" if labels else None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    found = survey(root)
    all_recordings = recordings(found, _labels(found))
    return make_clips(root, all_recordings, "sewa", {one.name: split_of(one.name) for one in all_recordings})


def _labels(found: Found) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in found.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        wanted = folder != found.root and folder.name.lower().startswith("label")
        if wanted and tables and _is_table(folder / tables[0]):
            labels += [("", folder / name) for name in tables]
    return labels


def _is_table(path: Path) -> bool:
    return head(path).partition("\n")[0].count(";") >= _FEWEST_COLUMNS - 1
