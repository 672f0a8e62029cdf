"""The layouts that can be read, and the way from a folder to its clips."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vaflow.datasets import afew_va, affwild2, muse, recola, sewa, videos
from vaflow.datasets.clip import Clip, Dataset, Note
from vaflow.datasets.files import entries, seen
from vaflow.errors import UsageError, explain

AUTO = "auto"


@dataclass(frozen=True)
class Layout:
    """How one kind of folder is read.

    Attributes:
        looks_for: what `detect` needs to find, for messages.
        detect: root -> why it may be of this layout, or None.
        scan: root -> clips in any order, and notes.
    """

    looks_for: str
    detect: Callable[[Path], str | None]
    scan: Callable[[Path], tuple[list[Clip], list[Note]]]


# In the order in which `auto` tries them: what is most particular comes first.
LAYOUTS: dict[str, Layout] = {
    "affwild2": Layout(affwild2.LOOKS_FOR, affwild2.detect, affwild2.scan),
    "afew-va": Layout(afew_va.LOOKS_FOR, afew_va.detect, afew_va.scan),
    "recola": Layout(recola.LOOKS_FOR, recola.detect, recola.scan),
    "sewa": Layout(sewa.LOOKS_FOR, sewa.detect, sewa.scan),
    "muse": Layout(muse.LOOKS_FOR, muse.detect, muse.scan),
    "videos": Layout(videos.LOOKS_FOR, videos.detect, videos.scan),
}


def open_dataset(root: str | Path, layout: str = AUTO) -> Dataset:
    """The clips below `root`. No media file is opened: problems inside files are `vaflow check`'s to find.

    Args:
        root: the data set's folder.
        layout: a key of `LAYOUTS`, or "auto" for the first one that fits.

    Raises:
        UsageError: the root is not a folder or is empty, the layout is unknown or does not fit, or a list in the
            folder (splits, test trials) has mistakes.
    """
    folder = _folder(Path(root).expanduser().absolute())
    if layout == AUTO:
        layout = _first_fit(folder)
    else:
        _must_fit(folder, layout)
    clips, notes = LAYOUTS[layout].scan(folder)
    return Dataset(folder, layout, tuple(sorted(clips, key=lambda clip: clip.id)), tuple(notes))


def _folder(root: Path) -> Path:
    if not root.exists():
        parent = next((folder for folder in root.parents if folder.is_dir()), Path("/"))
        got = f"{root}, which does not exist; {parent} holds {seen(parent)}"
        raise UsageError(explain("There is no such data set", expected="an existing folder", got=got))
    if not root.is_dir():
        remedy = f"Name the folder: {root.parent}"
        raise UsageError(
            explain("The data set is not a folder", expected="a folder", got=f"the file {root}", remedy=remedy)
        )
    if not entries(root):
        remedy = "Unpack the data set there, or check that it is mounted and that you may read it"
        raise UsageError(explain(f"{root} is empty", expected=_all_look_for(), got="an empty folder", remedy=remedy))
    return root


def _first_fit(root: Path) -> str:
    for name, layout in LAYOUTS.items():
        if layout.detect(root):
            return name
    remedy = "Name the data set's own folder, the one that holds these"
    raise UsageError(explain(f"No layout fits {root}", expected=_all_look_for(), got=seen(root), remedy=remedy))


def _must_fit(root: Path, layout: str) -> None:
    choices = [AUTO, *LAYOUTS]
    if layout not in LAYOUTS:
        raise UsageError(explain("There is no such layout", got=layout, choices=choices))
    if LAYOUTS[layout].detect(root):
        return
    fitting = [name for name, other in LAYOUTS.items() if other.detect(root)]
    remedy = f"The layout {fitting[0]!r} fits: use it, or name another folder" if fitting else None
    problem = f"{root} is not of the layout {layout!r}"
    raise UsageError(explain(problem, expected=LAYOUTS[layout].looks_for, got=seen(root), remedy=remedy))


def _all_look_for() -> str:
    return "; or ".join(f"{layout.looks_for} ({name})" for name, layout in LAYOUTS.items())
