"""What RECOLA, SEWA and MuSe have in common: labels, videos and sound in folders of their own, matched by name.

Only names decide what belongs together: `Train_01.csv`, `Train_01.mp4` and `Train_01.wav` are one recording, in
whichever folders they stand. Upper and lower case are the same. Where there is no file of sound, the video's own
sound is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import is_video, walk
from vaflow.datasets.splits import SPLITS_FILE, match_splits, read_splits

SOUNDS = (".wav", ".flac", ".m4a", ".mp3")
TABLES = (".csv", ".arff")
DIMENSIONS = ("arousal", "valence")

_PREFIX = re.compile(r"(train|devel|dev|test)(?=[ _-])", re.IGNORECASE)
_SPLITS = {"train": "train", "devel": "val", "dev": "val", "test": "test"}


@dataclass
class Found:
    """What stands below a root, in the order of the walk.

    Attributes:
        tables: (folder, names of its .csv and .arff files), for every folder that has some.
        videos, sounds: files.
    """

    root: Path
    tables: list[tuple[Path, list[str]]] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    sounds: list[Path] = field(default_factory=list)


@dataclass
class Recording:
    """One name and its files, in the order in which they were found. `labels`: target ("" for both) -> files."""

    name: str
    videos: list[Path] = field(default_factory=list)
    sounds: list[Path] = field(default_factory=list)
    labels: dict[str, list[Path]] = field(default_factory=dict)


def survey(root: Path, *, media: bool = True) -> Found:
    """Look through the folders below `root`; without `media` for tables only."""
    found = Found(root)
    for folder, files in walk(root):
        names = [entry.name for entry in files]  # paths are slow to make: only of what is wanted
        if media:
            found.videos += [folder / name for name in names if is_video(name)]
            found.sounds += [folder / name for name in names if name.lower().endswith(SOUNDS)]
        tables = [name for name in names if name.lower().endswith(TABLES)]
        if tables:
            found.tables.append((folder, tables))
    return found


def split_of(name: str) -> str | None:
    """The split that a recording's name begins with: train_, dev_ or devel_, test_, in any case."""
    match = _PREFIX.match(name)
    return _SPLITS[match[1].lower()] if match else None


def recordings(found: Found, labels: Sequence[tuple[str, Path]]) -> list[Recording]:
    """Files brought together by name; `labels` are (target, file). Sound of no recording is left out."""
    known: dict[str, Recording] = {}

    def of(path: Path) -> Recording:
        return known.setdefault(path.stem.casefold(), Recording(path.stem))

    for target, path in labels:
        of(path).labels.setdefault(target, []).append(path)
    for path in found.videos:
        of(path).videos.append(path)
    for path in found.sounds:
        if path.stem.casefold() in known:
            of(path).sounds.append(path)
    return list(known.values())


def make_clips(
    root: Path, found: Sequence[Recording], label_format: str, splits: Mapping[str, str | None]
) -> tuple[list[Clip], list[Note]]:
    """Clips and notes.

    Args:
        root: the data set's folder; its `splits.csv`, if there is one, wins over `splits`.
        found: the recordings.
        label_format: of their label files.
        splits: name -> split, as the layout has it.

    Raises:
        UsageError: `splits.csv` has mistakes.
    """
    by_item = dict(splits)
    notes: list[Note] = []
    if (root / SPLITS_FILE).is_file():
        named = {name: split for name, split in splits.items() if split is not None}
        given = named | read_splits(root / SPLITS_FILE)
        chosen, notes = match_splits(given, [(recording.name, recording.name) for recording in found])
        by_item |= chosen
    clips = []
    for recording in found:
        clip, more = _clip(root, recording, label_format, by_item.get(recording.name))
        clips.append(clip)
        notes += more
    return clips, notes


def _clip(root: Path, recording: Recording, label_format: str, split: str | None) -> tuple[Clip, list[Note]]:
    name = recording.name
    notes = []
    for what, paths in (("video", recording.videos), ("sound", recording.sounds), *recording.labels.items()):
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(root)) for path in paths)
            message = f"Several files of {what or 'labels'} are named {name}: {shown}; the first is used"
            remedy = "Keep the one that belongs to the recording"
            notes.append(Note("warning", "several-files", name, message, remedy))
    video = recording.videos[0] if recording.videos else None
    audio = recording.sounds[0] if recording.sounds else video
    files = {target: paths[0] for target, paths in sorted(recording.labels.items())}
    if len(files) == 1 and "" not in files:
        message = f"There are labels for {next(iter(files))} only"
        notes.append(Note("note", "one-dimension", name, message, "The other dimension is neither trained nor scored"))
    labels = next(iter(files.values()), None)
    dimensions = () if "" in files else tuple(files.items())
    clip = Clip(name, split, name, video, audio, (), labels, label_format if labels else "none", dimensions)
    return clip, notes
