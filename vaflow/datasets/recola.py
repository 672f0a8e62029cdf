"""Layout `recola`: RECOLA as released for the AVEC 2015 and 2016 challenges.

    [*/]arousal/<name>.arff  [*/]valence/<name>.arff     gold standard every 0.04 s, or .csv separated by semicolons
    recordings_video/<name>.mp4   recordings_audio/<name>.wav

`detect` looks, down to four folders below the root, for a folder named `arousal` or `valence` whose first table has
the field GoldStandard: features and the ratings of single raters are in folders of the same names and are not labels.
Video and audio may be in any folder. Names that begin with train_, dev_ or test_ give the split; for others (P16, P17
...) ROOT/splits.csv (`name,split`) can.
"""

from pathlib import Path

from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import head
from vaflow.datasets.labels import NOT_A_NUMBER, DimensionLabels, LabelFile, split_cells
from vaflow.datasets.recordings import DIMENSIONS, Files, detect_labels, scan_recordings

LOOKS_FOR = "folders arousal/ and valence/ of gold standard files (.arff, or .csv with the field GoldStandard)"

_EXPECTED = (
    "the fields instance name, frameTime (seconds) and GoldStandard (in [-1, 1]), declared by '@attribute' lines "
    "with '@data' after them (.arff), or by a header separated by semicolons (.csv)"
)
_TIME, _GOLD = "frametime", "goldstandard"


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout, or None."""
    return detect_labels(root, _label_files, "a gold standard")


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    return scan_recordings(root, _label_files, "recola")


def _label_files(files: Files) -> list[tuple[str, Path]]:
    return [
        (folder.name.lower(), folder / name)
        for folder, tables in files.tables
        if folder.name.lower() in DIMENSIONS and _GOLD in _plain(head(folder / tables[0]))
        for name in tables
    ]


def read_recola(path: Path) -> DimensionLabels:
    """One dimension of one recording. Fields other than time and gold standard are ignored.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, _EXPECTED)
    if text.lines[0].lstrip().startswith(("@", "%")):
        lines = list(enumerate(text.lines, 1))
        data = next((number for number, line in lines if line.strip().lower().startswith("@data")), len(lines))
        first = next((number for number, line in lines[data:] if line.strip()), len(lines) + 1)
        separator = ","
        words = [line.split() for line in text.lines[: first - 1]]
        fields = [row[1].strip("'\"") for row in words if len(row) > 1 and row[0].lower() == "@attribute"]
    else:
        fields, first, separator = split_cells(text.lines[0], ";"), 2, ";"
    names = [_plain(field) for field in fields]
    if names.count(_TIME) != 1 or names.count(_GOLD) != 1:
        raise text.error(f"the fields {', '.join(fields)[:80]!r}")
    time, value, _ = text.timed_values(names, _TIME, [_GOLD], first=first, separator=separator, missing=NOT_A_NUMBER)
    return DimensionLabels(time.astype(float), value[:, 0])


def _plain(name: str) -> str:
    """A field's name in lower case, without blanks and underscores."""
    return "".join(name.lower().replace("_", " ").split())
