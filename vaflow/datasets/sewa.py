"""Layout `sewa`: SEWA as released for the AVEC 2017 to 2019 challenges.

    [*/]labels/<name>.csv        timestamp; arousal; valence (; liking) every 0.1 s, with or without a header
    */<name>.mp4 | .avi ...      */<name>.wav

`detect` looks, down to four folders below the root, for a folder whose name begins with `label` and whose first .csv
is separated by semicolons. Video and audio may be in any folder. Names that begin with Train_, Devel_ or Test_ give
the split; ROOT/splits.csv (`name,split`) wins over them.
"""

from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import head
from vaflow.datasets.labels import NOT_A_NUMBER, TARGETS, LabelFile, is_number, split_cells
from vaflow.datasets.recordings import Files, detect_labels, scan_recordings

LOOKS_FOR = "a folder labels/ of .csv files separated by semicolons"

_EXPECTED = (
    "columns separated by semicolons: instance name (optional), timestamp (seconds), arousal, valence, and optionally "
    "liking; a header may name them"
)
_IN_ORDER = ("timestamp", "arousal", "valence", "liking")
_FEWEST_COLUMNS = 3  # time, arousal, valence


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout, or None."""
    return detect_labels(root, _label_files, "a table of labels")


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    return scan_recordings(root, _label_files, "sewa")


def _label_files(files: Files) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in files.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        if not tables or folder == files.root or not folder.name.lower().startswith("label"):
            continue
        if head(folder / tables[0]).partition("\n")[0].count(";") >= _FEWEST_COLUMNS - 1:
            labels += [("", folder / name) for name in tables]
    return labels


def read_sewa(path: Path) -> Annotation:
    """Arousal and valence. Without a header the columns are in the order of the challenges' files.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, _EXPECTED)
    cells = split_cells(text.lines[0], ";")
    names = [cell.lower().replace("_", "") for cell in cells]
    first = 2
    if any(target in names for target in TARGETS):
        names = ["timestamp" if name in ("time", "frametime") else name for name in names]
    else:
        first, columns = 1, [] if is_number(cells[0]) else ["name"]
        count = len(cells) - len(columns)
        names = [*columns, *_IN_ORDER[:count]] if _FEWEST_COLUMNS <= count <= len(_IN_ORDER) else []
    targets = tuple(target for target in TARGETS if target in names)
    if "timestamp" not in names or not targets or len(set(names)) != len(names):
        raise text.header_error()
    time, value, _ = text.timed_values(names, "timestamp", targets, first=first, separator=";", missing=NOT_A_NUMBER)
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(target) for target in targets]] = value
    return Annotation(value=both, time=time.astype(float), targets=targets)
