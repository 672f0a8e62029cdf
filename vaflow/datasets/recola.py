"""Layout `recola`: RECOLA as the AVEC 2015 and 2016 challenges gave it out.

    [*/]arousal/<name>.arff  [*/]valence/<name>.arff     gold standard, or .csv separated by semicolons
    recordings_video/<name>.mp4   recordings_audio/<name>.wav

`detect` looks, down to four folders below the root, for a folder named `arousal` or `valence` whose first table names
the field GoldStandard: features and the ratings of single raters stand in folders of the same names and are not
labels. Video and sound may stand in any folder. Names that begin with train_, dev_ or test_ say the split; for others
(P16, P17 ...) ROOT/splits.csv (`name,split`) can.
"""

from pathlib import Path

from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.recordings import DIMENSIONS, Found, make_clips, recordings, split_of, survey
from vaflow.datasets.walk import head

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
