"""Layout `videos`: any folder of video and audio files, with labels beside them and a list of splits, both optional.

    ROOT/**/<stem>.mp4 ...      any container that FFmpeg opens
    ROOT/**/<stem>.wav ...      audio alone: a clip without a visual stream, unless a video of that name is beside it
    ROOT/**/<stem>.csv          frame (0-based) or time (seconds); valence and/or arousal
    ROOT/**/<stem>#K.csv        labels of person K, where all people of a clip are extracted
    ROOT/splits.csv             name, split, and optionally group

Hidden files and folders are skipped. Caches, runs, pages and overlay videos of predictions are left out, and so are
linked folders: they may leave the root or lead in circles.
Everything else that is not used becomes a note.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation, Clip, Note, clip_and_person, person_item
from vaflow.datasets.files import (
    SPLITS_FILE,
    LeftOut,
    assign,
    entries,
    is_audio,
    is_folder,
    is_regular,
    is_video,
    other_directory,
    separator_of,
)
from vaflow.datasets.labels import TARGETS, LabelFile, split_cells
from vaflow.errors import DataError, examples, explain

PERSON_LABELS = "person-labels"  # code of the note on labels that only --person all reads
OVERLAY = ".overlay.mp4"  # of `vaflow predict --video`, beside its table
LOOKS_FOR = "video or audio files (mp4, mov, avi, mkv, webm, mpg, wmv, wav, mp3 ...) in any folder"

_EXPECTED = (
    "a header with 'frame' or 'time', and 'valence' and/or 'arousal', separated by commas, semicolons or tabs; "
    "then one row a line"
)


@dataclass
class _Files:
    """Paths below the root, as text with forward slashes. `tables`: path without its .csv -> path."""

    videos: list[str] = field(default_factory=list)
    audio: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout (its first video or audio file), or None."""
    files = _survey(root, LeftOut(root), first_only=True)
    return next((f"{path} is a video or audio file" for path in [*files.videos, *files.audio]), None)


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    left_out = LeftOut(root)
    files = _survey(root, left_out)
    with_video = {_stem(path) for path in files.videos}
    beside = [path for path in files.audio if _stem(path) in with_video]
    media = [*files.videos, *(path for path in files.audio if _stem(path) not in with_video)]
    items = dict(zip(item_ids(media), media, strict=True))
    assigned = assign(root, list(items.items()))
    people: dict[str, list[int]] = {}
    for table in files.tables.keys() - {_stem(path) for path in media}:
        stem, number = clip_and_person(table)
        people.setdefault(stem, []).append(number)
    clips = []
    for item, path in items.items():
        labels = root / files.tables[_stem(path)] if _stem(path) in files.tables else None
        numbers = people.get(_stem(path), ()) if is_video(path) else ()
        clips.append(
            Clip(
                id=item,
                split=assigned.splits.get(item),
                group=assigned.groups.get(item, item),
                video=root / path if is_video(path) else None,
                audio=root / path,
                labels=labels,
                label_format="csv" if labels else "none",
                person_labels=tuple((k, root / files.tables[person_item(_stem(path), k)]) for k in sorted(numbers)),
            )
        )
    return clips, [*left_out.notes(), *_table_notes(files, media, clips, beside), *assigned.notes]


def item_ids(paths: list[str]) -> list[str]:
    """The path without its extension; with it, if it would be the id of two files."""
    short = Counter(_stem(path) for path in paths)
    full = set(paths)
    return [path if short[_stem(path)] > 1 or _stem(path) in full else _stem(path) for path in paths]


def _stem(path: str) -> str:
    """The path without the last extension."""
    return path[: path.rindex(".")]


def _survey(root: Path, left_out: LeftOut, *, first_only: bool = False) -> _Files:
    """Sort all files below the root by kind; with `first_only`, stop at the first folder that has media."""
    files = _Files()
    queue = [""]
    while queue:
        folder = queue.pop()
        inside: list[str] = []
        for entry in entries(root / folder, left_out):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_folder(entry) and other_directory(root / path):
                left_out.outputs.append(path)
            elif is_folder(entry):
                (left_out.linked if entry.is_symlink() else inside).append(path)
            elif path.lower().endswith(".csv"):
                if path != SPLITS_FILE:
                    files.tables[_stem(path)] = path
            elif not is_regular(entry):
                left_out.unusable.append(path)
            elif is_video(path):
                files.videos.append(path)
            elif is_audio(path):
                files.audio.append(path)
            else:
                left_out.ignored.append(path)
        if first_only and (files.videos or files.audio):
            break
        queue += reversed(inside)
    overlays = {path for path in files.videos if path.endswith(OVERLAY) and path.removesuffix(OVERLAY) in files.tables}
    left_out.ignored += overlays
    files.videos = [path for path in files.videos if path not in overlays]
    return files


def _table_notes(files: _Files, media: list[str], clips: list[Clip], beside: list[str]) -> list[Note]:
    """Notes on tables without media, tables of several files, and audio files beside a video."""
    notes = []
    used = {_stem(path) for path in media}
    shows_people = {_stem(path) for path in media if is_video(path)}
    unused = {table for table in files.tables.keys() - used if clip_and_person(table)[0] not in shows_people}
    if orphans := sorted(unused):
        message = f"Tables without a video or audio file of their name: {examples(orphans)}"
        remedy = "Put the recording beside its table, or rename the table"
        notes.append(Note("note", "table-without-video", "", message, remedy))
    if bare := [clip.id for clip in clips if clip.person_labels and not clip.labels]:
        message = f"Clips with tables of persons (CLIP#1.csv ...) and none of the clip: {examples(bare)}"
        notes.append(Note("warning", PERSON_LABELS, "", message, "Extract them with --person all, or without labels"))
    shared = Counter(clip.labels for clip in clips if clip.labels)
    for clip in clips:
        if clip.labels and shared[clip.labels] > 1:
            message = f"{clip.labels.name} is beside several recordings of that name and is used for each"
            notes.append(Note("warning", "shared-labels", clip.id, message, "Rename the one that it does not fit"))
    if beside:
        message = f"Audio files beside a video of their name are not used: {examples(sorted(beside))}"
        notes.append(Note("note", "audio-beside-video", "", message, "The video's own audio stream is used"))
    return notes


def has_predictions(header: Sequence[str]) -> bool:
    """Whether a table with these columns was written by `vaflow predict` or `vaflow evaluate`."""
    return list(header[:4]) == ["frame", "time", "valence", "arousal"] and "region" in header


def read_csv(path: Path, names_of: Callable[[list[str]], list[str]] | None = None) -> Annotation:
    """A table with a column `frame` (0-based) or `time` (seconds), and `valence`, `arousal` or one of them.

    With both, `frame` counts. Other columns are ignored. Values are in [-1, 1]; -5, NaN, NA or an empty cell is
    not annotated. Frames and times ascend. Cells may be separated by semicolons or tabs, and then have decimal commas.

    Args:
        names_of: header -> names of the columns; None: the header in lower case.

    Raises:
        DataError: with every problem and its lines; or the table holds predictions.
    """
    text = LabelFile(path, _EXPECTED)
    separator = separator_of(text.lines[0])
    cells = split_cells(text.lines[0], separator)
    header = names_of(cells) if names_of is not None else [cell.lower() for cell in cells]
    if names_of is None and has_predictions(header):  # found beside a video; nobody has named it
        remedy = (
            "Move it out of the data set. To train on predictions, keep only the columns frame, valence and arousal"
        )
        raise DataError(explain(f"{path} holds predictions", expected="labels", got=text.lines[0], remedy=remedy))
    clock = next((name for name in ("frame", "time") if name in header), "")
    targets = tuple(name for name in TARGETS if name in header)
    roles = [name for name in header if name in (clock, *TARGETS)]
    if not clock or not targets or len(set(roles)) != len(roles):
        raise text.header_error()
    stated_times = "time" if clock == "frame" and "time" in header else ""
    at, value, stated = text.timed_values(header, clock, targets, separator=separator, stated=stated_times)
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(name) for name in targets]] = value
    if clock == "frame":
        return Annotation(value=both, frame=at.astype(np.int64), targets=targets, stated=stated)
    return Annotation(value=both, time=at, targets=targets)
