"""Folders on disk -> clips: choose the layout that fits, list its clips, and read the annotation of any of them.

Readers report all problems of a file in one error. A value of -5 marks an unannotated row and is read as NaN.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from vaflow.datasets import afew_va, affwild2, recordings, videos
from vaflow.datasets.clip import SPLITS, Annotation, Clip, Dataset, Layout, Note
from vaflow.datasets.files import LeftOut, entries, listing, other_directory
from vaflow.datasets.labels import DimensionLabels, merge_dimensions
from vaflow.errors import UsageError, explain

__all__ = ["LAYOUTS", "SPLITS", "Annotation", "Clip", "Dataset", "Layout", "Note", "log_left_out", "open_dataset"]

# Formats with one file per clip ...
READERS: dict[str, Callable[[Path], Annotation]] = {
    "affwild2": affwild2.read_affwild2,
    "csv": videos.read_csv,
    "afew-va": afew_va.read_afew_va,
    "sewa": recordings.read_sewa,
}

# ... and with one file per clip and dimension.
DIMENSION_READERS: dict[str, Callable[[Path], DimensionLabels]] = {
    "recola": recordings.read_recola,
    "muse": recordings.read_muse,
}
AUTO = "auto"
log = logging.getLogger(__name__)


def read_annotation(clip: Clip, person: int = 0) -> Annotation | None:
    """The labels of `clip`; None if it has none. A -5 in one dimension leaves the other one annotated.

    Args:
        person: number; the labels of this person, if there is a table of them.

    Raises:
        DataError: the file cannot be used; the message names every problem with its lines.
    """
    of_person = dict(clip.person_labels)
    if person in of_person:
        return videos.read_csv(of_person[person])
    if clip.dimensions:
        read = DIMENSION_READERS[clip.label_format]
        return merge_dimensions({target: read(path) for target, path in clip.dimensions})
    if clip.labels is None:
        return None
    return READERS[clip.label_format](clip.labels)


# In the order in which `auto` tries them: specific layouts first.
LAYOUTS: dict[str, Layout] = {
    "affwild2": Layout(affwild2.LOOKS_FOR, affwild2.detect, affwild2.scan),
    "afew-va": Layout(afew_va.LOOKS_FOR, afew_va.detect, afew_va.scan),
    "recola": recordings.RECOLA,
    "sewa": recordings.SEWA,
    "muse": recordings.MUSE,
    "videos": Layout(videos.LOOKS_FOR, videos.detect, videos.scan),
}


def open_dataset(root: str | Path, layout: str = AUTO) -> Dataset:
    """The clips below `root`. No media file is opened: `vaflow check` finds problems inside files.

    Args:
        layout: a key of `LAYOUTS`, or "auto" for the first one that fits.

    Raises:
        UsageError: the root is not a folder or is empty, the layout is unknown or does not fit, or a list in the
            folder (splits, test trials) has mistakes.
    """
    folder = Path(root).expanduser().absolute()
    _require_files(folder)
    if layout not in (AUTO, *LAYOUTS):
        raise UsageError(explain("Unknown layout", got=layout, choices=[AUTO, *LAYOUTS]))
    if layout == AUTO or not LAYOUTS[layout].detect(folder):
        fitting = next((name for name in LAYOUTS if LAYOUTS[name].detect(folder)), "")
        if layout != AUTO or not fitting:
            if kind := other_directory(folder):
                raise UsageError(explain(f"{folder} is {kind}", expected="the folder of a data set: videos and labels"))
            if layout == AUTO:
                problem, expected = f"No layout fits {folder}", _all_look_for()
                remedy: str | None = "Name the data set's own folder, the one that holds these"
            else:
                problem, expected = f"{folder} is not of the layout {layout!r}", LAYOUTS[layout].looks_for
                other = f"The layout {fitting!r} fits: use --layout {fitting}, or name another folder"
                remedy = other if fitting else None
            raise UsageError(explain(problem, expected=expected, got=listing(folder), remedy=remedy))
        layout = fitting
    clips, notes = LAYOUTS[layout].scan(folder)
    return Dataset(folder, layout, tuple(sorted(clips, key=lambda clip: clip.id)), tuple(notes))


def log_left_out(dataset: Dataset, skip: Sequence[str] = ()) -> None:
    """Log the warnings, errors and ignored files of a scan, as `check` lists them, except those of the codes `skip`."""
    for note in dataset.notes:
        if note.code not in skip and (note.severity != "note" or note.code == "ignored-files"):
            message = explain(note.message, remedy=note.remedy or None)
            log.warning("%s%s", f"{note.item}: " if note.item else "", message)


def _require_files(root: Path) -> None:
    """Raise a UsageError if the root is not a folder, or nothing in it can be listed."""
    if not root.exists():
        parent = next((folder for folder in root.parents if folder.is_dir()), Path("/"))
        got = f"{root}, which does not exist; {parent} holds {listing(parent)}"
        raise UsageError(explain("The data set does not exist", expected="an existing folder", got=got))
    if not root.is_dir():
        remedy = f"Name the folder: {root.parent}"
        problem = "The data set is not a folder"
        raise UsageError(explain(problem, expected="a folder", got=f"the file {root}", remedy=remedy))
    left_out = LeftOut(root)
    if not entries(root, left_out):
        if notes := left_out.notes():
            got = "; ".join(note.message for note in notes)
            problem = f"{root} has no file that can be used"
            raise UsageError(explain(problem, expected=_all_look_for(), got=got, remedy=notes[0].remedy))
        remedy = "Unpack the data set there, or check that it is mounted and that you may read it"
        raise UsageError(explain(f"{root} is empty", expected=_all_look_for(), got="an empty folder", remedy=remedy))


def _all_look_for() -> str:
    return "; or ".join(f"{layout.looks_for} ({name})" for name, layout in LAYOUTS.items())
