"""Layout `affwild2`: the challenge's videos, crop archives and annotations, as they come out of their archives.

    raw_videos/ batch1/ batch2/ ...                      <video>.mp4 | .avi
    cropped_aligned*/<trial>/00001.jpg                   several archives are merged
    [*/]VA_Estimation_Challenge|VA_Set/{Train_Set,Validation_Set}/<trial>.txt
    *test*.txt                                           the test trials: names, or a sample submission

A trial is one person in one video; `<video>_left` and `<video>_right` share the video, its sound and their group.
`affwild2_tree.py` finds the files; here trials are put together.
"""

from collections import defaultdict
from pathlib import Path

from vaflow.datasets.affwild2_tree import Tree, listed_trials, survey
from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.files import examples

LOOKS_FOR = "VA_Estimation_Challenge/ or VA_Set/ with Train_Set/ and Validation_Set/, or folders cropped_aligned*/"

SIDES = ("_left", "_right")


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout, or None."""
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
    """The video's stem that a trial's name tells: without `_left` or `_right`."""
    for side in SIDES:
        if trial.endswith(side) and trial != side:
            return trial.removesuffix(side)
    return trial


class _Trials:
    """Trials of a tree: which there are, in which split, and which files belong to each."""

    def __init__(self, tree: Tree) -> None:
        self.notes: list[Note] = list(tree.notes)
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
        for found in self.labels.values():
            found.sort(key=lambda entry: (entry[0] != "val", entry[1]))
        self.elsewhere = tree.other_tracks
        known = self.labels.keys() | self.crops.keys() | self.videos.keys()
        self.listed, notes = listed_trials(tree.lists, known)
        self.notes += notes

    def splits(self) -> dict[str, str | None]:
        """Trial -> split, for every trial there is."""
        splits: dict[str, str | None] = {name: self._labelled_split(name) for name in self.labels}
        unlabelled = (self.listed | self.crops.keys()) - splits.keys()
        claimed = {self._stem(name) for name in splits.keys() | unlabelled}
        unlabelled |= self.videos.keys() - claimed
        splits |= {name: self._unlabelled_split(name) for name in unlabelled}
        lost = sorted(name for name, split in splits.items() if split is None)
        if lost:
            message = f"No annotation, and not among the test trials: {examples(lost)}"
            remedy = "They are extracted without a split; take their files away if they belong to another track"
            self.notes.append(Note("note", "no-split", "", message, remedy))
        return splits

    def clip(self, name: str, split: str | None) -> Clip:
        """The record of one trial."""
        stem = self._stem(name)
        paths = self.videos.get(stem, [])
        if len(paths) > 1:
            found = ", ".join(str(path.relative_to(self.root)) for path in paths)
            message = f"Several videos are named {stem}: {found}; the first is used"
            self.notes.append(Note("warning", "two-videos", name, message, "Keep the one that the labels belong to"))
        video = paths[0] if paths else None
        labels = self.labels[name][0][1] if name in self.labels else None
        crops = tuple(self.crops.get(name, ()))
        return Clip(name, split, stem, video, video, crops, labels, "affwild2" if labels else "none")

    def _stem(self, trial: str) -> str:
        return trial if trial in self.videos else strip_side(trial)

    def _labelled_split(self, name: str) -> str:
        """The split of a trial's annotation; where it has several, one is chosen: validation before training."""
        found = self.labels[name]
        if len(found) > 1:
            paths = ", ".join(str(path.relative_to(self.root)) for _, path in found)
            across = len({split for split, _ in found}) > 1
            message = f"Several annotation files: {paths}; the first is used"
            remedy = "Keep one of them: a trial in two splits makes validation worthless" if across else "Keep one"
            severity, code = ("error", "two-splits") if across else ("note", "two-annotations")
            self.notes.append(Note(severity, code, name, message, remedy))  # type: ignore[arg-type]
        if name in self.listed:
            message = f"The trial has an annotation ({found[0][0]}) and is in the list of test trials"
            self.notes.append(Note("warning", "labelled-test", name, message, "It is not used as a test trial"))
        return found[0][0]

    def _unlabelled_split(self, name: str) -> str | None:
        """Test, where the list of test trials says so; without a list, all that no other track annotates."""
        if self.listed:
            return "test" if name in self.listed else None
        return None if name in self.elsewhere else "test"
