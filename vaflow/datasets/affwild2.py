"""Layout `affwild2`: the challenge's videos, crop archives and annotations, as they come out of their archives.

    raw_videos/ batch1/ batch2/ ...                      <video>.mp4 | .avi
    cropped_aligned*/<trial>/00001.jpg                   several archives are merged
    [*/]VA_Estimation_Challenge|VA_Set/{Train_Set,Validation_Set}/<trial>.txt
    *test*.txt                                           the test trials: names, or a sample submission

A trial is one person in one video; `<video>_left` and `<video>_right` share the video, its audio and their group.
Folders of crops are recognised by their first files and never listed.
"""

import os
import re
from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import LeftOut, entries, is_folder, is_regular, is_video, open_text, size_problem
from vaflow.datasets.labels import TARGETS, LabelFile, is_number, split_cells
from vaflow.errors import UsageError, examples, explain

LOOKS_FOR = "VA_Estimation_Challenge/ or VA_Set/ with Train_Set/ and Validation_Set/, or folders cropped_aligned*/"
SIDES = ("_left", "_right")
DEPTH = 5  # folders below the root: `<archive>/Annotations/VA_Estimation_Challenge/Train_Set/`

_SPLIT_FOLDERS = {"train_set": "train", "training_set": "train", "validation_set": "val"}
_VALENCE_AROUSAL = re.compile(r"va([_ -]|$)|valence", re.IGNORECASE)
_OTHER_TRACKS = re.compile(r"(^|[_ -])(expr|aus?(?=[_ .-])|action|mtl)", re.IGNORECASE)
_CROP = re.compile(r"\d+\.(jpe?g|png)", re.IGNORECASE)
_SAMPLE_HEADER = ["image_location", "valence", "arousal"]


@dataclass
class Tree:
    """The parts of a data set below a root, each list in the order of paths.

    Attributes:
        videos: files below the root.
        crops: one folder per trial and archive.
        aligned: the archives' own folders.
        label_files: (split, folder, names of its .txt files).
        other_tracks: trials that only another track (expressions, action units) annotates.
        lists: text files that may list the test trials.
        left_out: names that cannot be used.
    """

    root: Path
    videos: list[Path] = field(default_factory=list)
    crops: list[Path] = field(default_factory=list)
    aligned: list[Path] = field(default_factory=list)
    label_files: list[tuple[str, Path, list[str]]] = field(default_factory=list)
    other_tracks: set[str] = field(default_factory=set)
    lists: list[Path] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    left_out: LeftOut = field(init=False)

    def __post_init__(self) -> None:
        self.left_out = LeftOut(self.root)

    @property
    def labels(self) -> list[tuple[str, Path]]:
        """(split, folder) of every folder of annotations that is not empty."""
        return [(split, folder) for split, folder, names in self.label_files if names]


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout, or None."""
    tree = survey(root)
    if tree.labels:
        return f"{tree.labels[0][1].relative_to(root)}/ holds annotations"
    if tree.aligned:
        return f"{tree.aligned[0].relative_to(root)}/ holds face crops"
    return None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips."""
    tree = survey(root)
    trials = _Trials(tree)
    splits = trials.splits()
    return [trials.clip(name, split) for name, split in splits.items()], trials.notes


def strip_side(trial: str) -> str:
    """Return the source video of a trial: its name without `_left` or `_right`."""
    for side in SIDES:
        if trial.endswith(side) and trial != side:
            return trial.removesuffix(side)
    return trial


class _Trials:
    """The trials of a tree: their splits, and the files that belong to each."""

    def __init__(self, tree: Tree) -> None:
        self.notes: list[Note] = [*tree.notes, *tree.left_out.notes()]
        self.root = tree.root
        self.crops: dict[str, list[Path]] = defaultdict(list)
        for folder in tree.crops:
            self.crops[folder.name].append(folder)
        self.videos: dict[str, list[Path]] = defaultdict(list)
        for path in tree.videos:
            self.videos[path.stem].append(path)
        self.labels: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for split, folder, names in tree.label_files:
            for name in names:
                self.labels[name.removesuffix(".txt")].append((split, folder / name))
        for labels_of_name in self.labels.values():
            labels_of_name.sort(key=lambda entry: (entry[0] != "val", entry[1]))
        self.elsewhere = tree.other_tracks
        known = self.labels.keys() | self.crops.keys() | self.videos.keys()
        self.listed, notes = listed_trials(tree.lists, known)
        self.notes += notes

    def splits(self) -> dict[str, str | None]:
        """Return trial -> split, for every trial."""
        splits: dict[str, str | None] = {name: self._labelled_split(name) for name in self.labels}
        unlabelled = (self.listed | self.crops.keys()) - splits.keys()
        claimed = {self._stem(name) for name in splits.keys() | unlabelled}
        unlabelled |= self.videos.keys() - claimed
        splits |= {name: self._unlabelled_split(name) for name in unlabelled}
        lost = sorted(name for name, split in splits.items() if split is None)
        if lost:
            message = f"No annotation, and not in the list of test trials: {examples(lost)}"
            remedy = "They are extracted without a split; remove their files if they belong to another track"
            self.notes.append(Note("note", "no-split", "", message, remedy))
        return splits

    def clip(self, name: str, split: str | None) -> Clip:
        """The record of one trial."""
        stem = self._stem(name)
        paths = self.videos.get(stem, [])
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(self.root)) for path in paths)
            message = f"Several videos are named {stem}: {shown}; the first is used"
            self.notes.append(Note("warning", "two-videos", name, message, "Keep the one that the labels belong to"))
        video = paths[0] if paths else None
        labels = self.labels[name][0][1] if name in self.labels else None
        crops = tuple(self.crops.get(name, ()))
        side = name.removeprefix(stem).removeprefix("_")
        return Clip(name, split, stem, video, video, crops, labels, "affwild2" if labels else "none", side=side)

    def _stem(self, trial: str) -> str:
        return trial if trial in self.videos else strip_side(trial)

    def _labelled_split(self, name: str) -> str:
        """Return the split of a trial's annotation; if there are several, validation takes precedence over training."""
        annotations = self.labels[name]
        if len(annotations) > 1:
            paths = ", ".join(str(path.relative_to(self.root)) for _, path in annotations)
            across = len({split for split, _ in annotations}) > 1
            message = f"Several annotation files: {paths}; the first is used"
            remedy = "Keep one: a trial in two splits invalidates validation" if across else "Keep one"
            severity, code = ("error", "two-splits") if across else ("note", "two-annotations")
            self.notes.append(Note(severity, code, name, message, remedy))  # type: ignore[arg-type]
        if name in self.listed:
            message = f"The trial has an annotation ({annotations[0][0]}) and is in the list of test trials"
            self.notes.append(Note("warning", "labelled-test", name, message, "It is not used as a test trial"))
        return annotations[0][0]

    def _unlabelled_split(self, name: str) -> str | None:
        """ "test" for trials in the list of test trials; without a list, for trials that no other track annotates."""
        if self.listed:
            return "test" if name in self.listed else None
        return None if name in self.elsewhere else "test"


def survey(root: Path) -> Tree:
    """Find videos, crops, annotations and lists; folders may be links, at most `DEPTH` deep."""
    tree = Tree(root)
    queue = deque([(root, 0)])
    visited = set()
    while queue:
        folder, depth = queue.popleft()
        try:
            status = folder.stat()
        except OSError:
            continue
        if depth > DEPTH or (status.st_dev, status.st_ino) in visited:  # a link may point to a parent
            continue
        visited.add((status.st_dev, status.st_ino))
        is_archive = folder.name.lower().startswith("cropped") and folder != root
        take = _take_archive if is_archive else _take_folder
        queue.extend((child, depth + 1) for child in take(tree, folder))
    for paths in (tree.videos, tree.crops, tree.aligned, tree.lists, tree.label_files):
        paths.sort()
    tree.other_tracks -= {name.removesuffix(".txt") for _, _, names in tree.label_files for name in names}
    others = [folder for folder in tree.aligned if "aligned" not in folder.name.lower()]
    if others and len(others) < len(tree.aligned):  # aligned crops are different images from the other ones
        tree.crops = [folder for folder in tree.crops if not any(other in folder.parents for other in others)]
        tree.aligned = [folder for folder in tree.aligned if folder not in others]
        names = examples([str(folder.relative_to(tree.root)) for folder in others])
        message = f"Crops that are not aligned are ignored, because there are aligned ones: {names}"
        tree.notes.append(Note("note", "crops-not-aligned", "", message))
    return tree


def listed_trials(lists: Collection[Path], known: Collection[str]) -> tuple[set[str], list[Note]]:
    """Names from every list of trials: files in which most names are `known`, or a sample submission.

    Raises:
        UsageError: a list cannot be read as text.
    """
    trials: set[str] = set()
    notes = []
    for path in lists:
        names, is_sample = _listed(path)
        fits = sum(name in known for name in names)
        if is_sample or (names and 2 * fits > len(names)):
            trials |= names
        elif names:
            message = f"{path.name} is not used as a list of test trials: {fits} of its {len(names)} lines name a trial"
            notes.append(Note("note", "not-a-list", "", message))
    return trials, notes


def _listed(path: Path) -> tuple[set[str], bool]:
    """The trials that a text file names, and whether it is a sample submission of this track."""
    names = set()
    if (problem := size_problem(path)) is not None:
        raise UsageError(explain(f"Cannot read the list of test trials {path}", got=problem))
    try:
        with open_text(path) as lines:
            header = next(lines, "").strip()
            cells = [cell.strip().lower() for cell in header.split(",")]
            if cells[0] == _SAMPLE_HEADER[0]:
                if cells != _SAMPLE_HEADER:
                    return set(), False  # another track's submission
                return {line.split(",", 1)[0].rpartition("/")[0] for line in lines if line.strip()}, True
            for line in (header, *lines):
                name = line.strip().rstrip("/")
                names.add(name.rpartition(".")[0] if is_video(name) else name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(explain(f"Cannot read the list of test trials {path}", got=error)) from error
    return names - {""}, False


def _take_archive(tree: Tree, folder: Path) -> list[Path]:
    """Record a crop archive's trials; return the folders that hold folders again (an archive unpacked into itself)."""
    nested: list[Path] = []
    tree.aligned.append(folder)
    for entry in entries(folder, tree.left_out):
        if is_folder(entry):
            child = Path(entry.path)
            (nested if _first_kind(child) == "folders" else tree.crops).append(child)
    return nested


def _take_folder(tree: Tree, folder: Path) -> list[Path]:
    """Record the videos, annotations and lists of a folder; return its folders."""
    if (split := _SPLIT_FOLDERS.get(folder.name.lower())) and folder != tree.root:
        texts = [entry.name for entry in entries(folder, tree.left_out) if entry.name.endswith(".txt")]
        if _VALENCE_AROUSAL.match(folder.parent.name) or folder.parent == tree.root:
            tree.label_files.append((split, folder, texts))
        else:
            tree.other_tracks |= {name.removesuffix(".txt") for name in texts}
        return []
    if _first_kind(folder) == "crops":
        if folder != tree.root:
            tree.crops.append(folder)
        return []
    nested: list[Path] = []
    for entry in entries(folder, tree.left_out):
        name = entry.name
        if is_folder(entry):
            nested.append(Path(entry.path))
        elif is_video(name):
            if is_regular(entry):
                tree.videos.append(Path(entry.path))
            else:
                tree.left_out.unusable.append(tree.left_out.name(entry.path))
        elif name.lower().endswith(".txt") and "test" in name.lower() and not _OTHER_TRACKS.search(name):
            tree.lists.append(Path(entry.path))
    return nested


def _first_kind(folder: Path) -> str:
    """Return the kind of a folder's first entry: "crops", "folders", "other" or "nothing"."""
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if _CROP.fullmatch(entry.name):
                    return "crops"
                if not entry.name.startswith("."):
                    return "folders" if is_folder(entry) else "other"
    except OSError:
        pass
    return "nothing"


def read_affwild2(path: Path) -> Annotation:
    """A challenge annotation file: header `valence,arousal`, then row k for frame k.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, "the first line 'valence,arousal', then two numbers a line, each in [-1, 1] or -5")
    header = [cell.lower() for cell in split_cells(text.lines[0])]
    if sorted(header) != sorted(TARGETS):
        if all(is_number(cell) for cell in header):
            raise text.error(f"no header: line 1 is {text.lines[0][:60]!r}")
        raise text.header_error()
    value = [[text.value(cell, number) for cell in cells] for number, cells in text.rows(2)]
    text.check(len(value))
    columns = np.array(value, np.float32)[:, [header.index(target) for target in TARGETS]]
    return Annotation(value=columns, frame=np.arange(len(value), dtype=np.int64))
