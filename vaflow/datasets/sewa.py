"""Layout `sewa`: SEWA as the AVEC 2017 to 2019 challenges gave it out.

    [*/]labels/<name>.csv        timestamp; arousal; valence (; liking), both dimensions in one file
    */<name>.mp4 | .avi ...      */<name>.wav

`detect` looks, down to four folders below the root, for a folder whose name begins with `label` and whose first .csv
is separated by semicolons. Video and sound may stand in any folder. Names that begin with Train_, Devel_ or Test_ say
the split; ROOT/splits.csv (`name,split`) wins over them.
"""

from pathlib import Path

from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.recordings import Found, make_clips, recordings, split_of, survey
from vaflow.datasets.walk import head

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
