"""The common part of RECOLA, SEWA and MuSe: labels, videos and audio in separate folders, matched by name.

Only names decide what belongs together: `Train_01.csv`, `Train_01.mp4` and `Train_01.wav` are one recording, whichever
folders they are in. Case is ignored. Without an audio file, the video's own audio stream is used.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import LeftOut, is_audio, is_regular, is_video, walk
from vaflow.datasets.splits import assign

TABLES = (".csv", ".arff")
DIMENSIONS = ("arousal", "valence")

_PREFIX = re.compile(r"(train|devel|dev|test)(?=[ _-])", re.IGNORECASE)
_SPLITS = {"train": "train", "devel": "val", "dev": "val", "test": "test"}


@dataclass
class Files:
    """The files below a root, in the order of the walk.

    Attributes:
        tables: (folder, names of its .csv and .arff files), for every folder that has some.
        videos, audio: media files.
    """

    root: Path
    tables: list[tuple[Path, list[str]]] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)


@dataclass
class Recording:
    """One name and its files, in the order of the walk. `labels`: target ("" for both) -> files."""

    name: str
    videos: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)
    labels: dict[str, list[Path]] = field(default_factory=dict)


LabelFiles = Callable[[Files], list[tuple[str, Path]]]  # -> (target, or "" for both; label file)


def detect_labels(root: Path, label_files: LabelFiles, kind: str) -> str | None:
    """Return why `root` matches a layout (its first label file); None if it has no label file."""
    files = Files(root, [(folder, names) for folder, entries in walk(root) if (names := _tables(entries))])
    labels = label_files(files)
    return f"{labels[0][1].relative_to(root)} is {kind}" if labels else None


def scan_recordings(
    root: Path,
    label_files: LabelFiles,
    label_format: str,
    official_splits: Callable[[Files, list[str]], tuple[Mapping[str, str], list[Note]]] | None = None,
) -> tuple[list[Clip], list[Note]]:
    """Clips and notes of a layout.

    Args:
        root: the data set's folder; its `splits.csv` wins over all other sources of a split.
        label_files: picks the label files out of all tables.
        label_format: of these files.
        official_splits: (files, names of recordings) -> splits and notes; by default a name's prefix gives the split.

    Raises:
        UsageError: a list of splits has mistakes.
    """
    files, left_out = Files(root), LeftOut(root)
    for folder, entries in walk(root, left_out):
        media = [entry for entry in entries if is_video(entry.name) or is_audio(entry.name)]
        left_out.unusable += [left_out.name(entry.path) for entry in media if not is_regular(entry)]
        usable = [folder / entry.name for entry in media if is_regular(entry)]
        files.videos += [path for path in usable if is_video(path.name)]
        files.audio += [path for path in usable if is_audio(path.name)]
        if tables := _tables(entries):
            files.tables.append((folder, tables))
    recordings = _match(files, label_files(files), left_out)
    names = [recording.name for recording in recordings]
    if official_splits is None:
        official: Mapping[str, str] = {
            name: _SPLITS[match[1].lower()] for name in names if (match := _PREFIX.match(name)) is not None
        }
        notes: list[Note] = []
    else:
        official, notes = official_splits(files, names)
    assigned = assign(root, [(name, name) for name in names], official)
    notes += [*assigned.notes, *left_out.notes()]
    clips = []
    for recording in recordings:
        notes += _file_notes(root, recording)
        name = recording.name
        video = recording.videos[0] if recording.videos else None
        audio = recording.audio[0] if recording.audio else video
        labels = {target: paths[0] for target, paths in sorted(recording.labels.items())}
        clips.append(
            Clip(
                id=name,
                split=assigned.splits.get(name),
                group=assigned.groups.get(name, name),
                video=video,
                audio=audio,
                labels=next(iter(labels.values()), None),
                label_format=label_format if labels else "none",
                dimensions=() if "" in labels else tuple(labels.items()),
            )
        )
    return clips, notes


def _tables(entries: list[os.DirEntry[str]]) -> list[str]:
    return [entry.name for entry in entries if entry.name.lower().endswith(TABLES)]


def _match(files: Files, labels: list[tuple[str, Path]], left_out: LeftOut) -> list[Recording]:
    """Recordings of all label files and videos; audio files without either are recorded as ignored."""
    known: dict[str, Recording] = {}
    for target, path in labels:
        known.setdefault(path.stem.casefold(), Recording(path.stem)).labels.setdefault(target, []).append(path)
    for path in files.videos:
        known.setdefault(path.stem.casefold(), Recording(path.stem)).videos.append(path)
    for path in files.audio:
        if path.stem.casefold() in known:
            known[path.stem.casefold()].audio.append(path)
        else:
            left_out.ignored.append(left_out.name(path))
    return list(known.values())


def _file_notes(root: Path, recording: Recording) -> list[Note]:
    """Notes on several files of one kind, and on a dimension without labels."""
    name, notes = recording.name, []
    for kind, paths in (("video", recording.videos), ("audio", recording.audio), *recording.labels.items()):
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(root)) for path in paths)
            message = f"Several {kind or 'label'} files are named {name}: {shown}; the first is used"
            notes.append(Note("warning", "several-files", name, message, "Keep the one that belongs to the recording"))
    if len(recording.labels) == 1 and "" not in recording.labels:
        message = f"Only {next(iter(recording.labels))} is labelled"
        remedy = "The other dimension is neither trained nor scored"
        notes.append(Note("note", "one-dimension", name, message, remedy))
    return notes
