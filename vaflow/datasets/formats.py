"""Read the annotation of any clip: a table of readers by label format.

Readers find every problem of a file before one error lists them all. A value of -5 marks an unannotated row; it
becomes NaN here and is never a number again.
"""

from collections.abc import Callable
from pathlib import Path

from vaflow.datasets.afew_va import read_afew_va
from vaflow.datasets.affwild2 import read_affwild2
from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.labels import DimensionLabels, merge_dimensions
from vaflow.datasets.muse import read_muse
from vaflow.datasets.recola import read_recola
from vaflow.datasets.sewa import read_sewa
from vaflow.datasets.videos import read_csv

# Formats with one file per clip ...
READERS: dict[str, Callable[[Path], Annotation]] = {
    "affwild2": read_affwild2,
    "csv": read_csv,
    "afew-va": read_afew_va,
    "sewa": read_sewa,
}

# ... and with one file per clip and dimension.
DIMENSION_READERS: dict[str, Callable[[Path], DimensionLabels]] = {
    "recola": read_recola,
    "muse": read_muse,
}


def read_annotation(clip: Clip) -> Annotation | None:
    """The labels of `clip`; None if it has none.

    A -5 in one dimension leaves the other one annotated.

    Raises:
        DataError: the file cannot be used; the message names every problem with its lines.
    """
    if clip.dimensions:
        read = DIMENSION_READERS[clip.label_format]
        return merge_dimensions({target: read(path) for target, path in clip.dimensions})
    if clip.labels is None:
        return None
    return READERS[clip.label_format](clip.labels)
