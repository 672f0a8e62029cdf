"""Write small AFEW-VA, RECOLA, SEWA and MuSe trees: real media files with drawn frames.

Every builder returns what it wrote. As in `affwild2_tree`, each picture shows its 1-based frame number as bars.
"""

import json
import wave
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
from affwild2_tree import SIDE, draw_number, label_path, write_video
from numpy.typing import NDArray
from PIL import Image

RATE = 25
AUDIO_RATE = 16_000


@dataclass
class Written:
    """One clip.

    Attributes:
        split: as `Clip.split` should be.
        times: [N] seconds of all frames.
        pictures: 0-based numbers of the frames that have a picture.
        rows: target -> {seconds: value, None where not annotated}; for AFEW-VA {frame number: value}.
        own_sound: a .wav was written; sound: seconds of it.
    """

    split: str | None
    times: NDArray[np.float64]
    frame_numbers: tuple[int, ...]
    rows: dict[str, dict[float, float | None]] = field(default_factory=dict)
    separate_audio: bool = False
    audio_seconds: float = 0.0


Tree = dict[str, Written]


def write_wave(path: Path, seconds: float) -> None:
    """A tone, 16 kHz mono; its pitch depends on the file name, so that no two recordings are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pitch = 0.1 + crc32(path.name.encode()) % 1000 / 10_000
    tone = (np.sin(np.arange(round(seconds * AUDIO_RATE)) * pitch) * 8000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(AUDIO_RATE)
        file.writeframes(tone.tobytes())


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def frame_times(frames: int) -> NDArray[np.float64]:
    return np.arange(frames) / RATE


# --- AFEW-VA


def build_afew_va(root: Path, frames: int = 30) -> Tree:
    """A clip at the root, one in an archive directory with a missing image and label gaps, one unlabelled."""
    return {
        "001": _write_afew_clip(root / "001", tuple(range(frames))),
        "02/051": _write_afew_clip(root / "02" / "051", tuple(k for k in range(frames) if k != 3), unannotated=(5, 6)),
        "02/052": _write_afew_clip(root / "02" / "052", tuple(range(frames)), labelled=False),
    }


def _write_afew_clip(
    folder: Path, frame_numbers: tuple[int, ...], *, unannotated: tuple[int, ...] = (), labelled: bool = True
) -> Written:
    folder.mkdir(parents=True)
    for number in frame_numbers:
        Image.fromarray(draw_number(number + 1)).save(folder / f"{number:05d}.png")
    written = Written(None, frame_times(max(frame_numbers) + 1), frame_numbers)
    if not labelled:
        return written
    whole = np.rint(label_path(max(frame_numbers) + 1, seed=len(folder.name)) * 10)
    entries = {}
    for number in frame_numbers:
        valence, arousal = (None, None) if number in unannotated else whole[number].tolist()
        landmarks = [[SIDE / 2 + k / 10, SIDE / 2] for k in range(68)]
        entries[f"{number:05d}"] = {"landmarks": landmarks, "valence": valence, "arousal": arousal}
        for target, value in (("valence", valence), ("arousal", arousal)):
            written.rows.setdefault(target, {})[number] = None if value is None else value / 10
    document = {"video_id": folder.name, "frames": entries, "actor": "drawn"}
    (folder / f"{folder.name}.json").write_text(json.dumps(document))
    return written


# --- RECOLA


def build_recola(root: Path, frames: int = 40) -> Tree:
    """Gold standard as ARFF and as CSV, a recording with one dimension, one without labels, and unrelated files."""
    gold = root / "ratings_gold_standard"
    tree = {}
    for seed, (name, split) in enumerate({"train_1": "train", "dev_1": "val", "test_1": "test", "P16": None}.items()):
        times = frame_times(frames)
        (root / "recordings_video").mkdir(parents=True, exist_ok=True)
        write_video(root / "recordings_video" / f"{name}.mp4", times, 0.5)
        tree[name] = written = Written(
            split, times, tuple(range(frames)), separate_audio=name != "dev_1", audio_seconds=0.5
        )
        if written.separate_audio:
            written.audio_seconds = 1.2
            write_wave(root / "recordings_audio" / f"{name}.wav", written.audio_seconds)
        if name == "test_1":
            continue
        values = label_path(frames, seed)
        for column, target in enumerate(("valence", "arousal")):
            if (name, target) == ("P16", "valence"):
                continue
            written.rows[target] = dict(zip(np.round(times, 2).tolist(), values[:, column].tolist(), strict=True))
            write = _write_csv_gold if name == "dev_1" else _write_arff_gold
            write(gold / target / name, name, written.rows[target])
    write_text(root / "ratings_individual" / "arousal" / "train_1.csv", "time;FM1 ;FF1", "0;0.1;0.2", "0.04;0.1;0.2")
    features = ("@relation f", "@attribute name string", "@attribute f0 numeric", "@data", "'train_1',1.5")
    write_text(root / "features_audio" / "arousal" / "train_1.arff", *features)
    return tree


def _write_arff_gold(path: Path, name: str, rows: dict[float, float | None]) -> None:
    head = ("@relation GOLD", "", "@attribute Instance_name string", "@attribute frameTime numeric")
    body = [f"'{name}',{time:.2f},{value}" for time, value in rows.items()]
    write_text(path.with_suffix(".arff"), *head, "@attribute GoldStandard numeric", "", "@data", "", *body)


def _write_csv_gold(path: Path, name: str, rows: dict[float, float | None]) -> None:
    body = [f"'{name}';{time:.2f};{value}" for time, value in rows.items()]
    write_text(path.with_suffix(".csv"), "instance name;frameTime;GoldStandard", *body)


# --- SEWA


def build_sewa(root: Path, frames: int = 40) -> Tree:
    """Label files without and with a header, a row that is not annotated, a recording without labels."""
    tree = {}
    for seed, (name, split) in enumerate({"Train_01": "train", "Devel_01": "val", "Test_01": "test"}.items()):
        times = frame_times(frames)
        tree[name] = written = Written(split, times, tuple(range(frames)), separate_audio=True, audio_seconds=1.0)
        (root / "video").mkdir(parents=True, exist_ok=True)
        write_video(root / "video" / f"{name}.avi", times, 0.4)
        write_wave(root / "audio" / f"{name}.WAV", written.audio_seconds)
        if split == "test":
            continue
        stamps = np.round(np.arange(0, times[-1], 0.1), 1)
        values = label_path(stamps.size, seed)
        written.rows = {
            "valence": dict(zip(stamps.tolist(), values[:, 0].tolist(), strict=True)),
            "arousal": dict(zip(stamps.tolist(), values[:, 1].tolist(), strict=True)),
        }
        body = [f"'{name}';{t:.1f};{a};{v};0.5" for t, (v, a) in zip(stamps, values, strict=True)]
        if split == "val":
            body[4] = f"'{name}';0.4;NaN;NaN;NaN"
            written.rows["valence"][0.4] = written.rows["arousal"][0.4] = None
            body.insert(0, "name;timestamp;arousal;valence;liking")
        write_text(root / "labels" / f"{name}.csv", *body)
    return tree


# --- MuSe


def build_muse(root: Path, frames: int = 60) -> Tree:
    """Two segments with a pause between them, 4 rows per second, other dimensions, a partition list."""
    labels = root / "c1_muse" / "label_segments"
    tree = {}
    for seed, (name, split) in enumerate({"1": "train", "2": "val", "10": "test"}.items()):
        times = frame_times(frames)
        tree[name] = written = Written(
            split, times, tuple(range(frames)), separate_audio=name == "1", audio_seconds=0.6
        )
        (root / "raw" / "video").mkdir(parents=True, exist_ok=True)
        write_video(root / "raw" / "video" / f"{name}.mp4", times, 0.6)
        if written.separate_audio:
            write_wave(root / "raw" / "audio" / f"{name}.wav", 2.0)
            written.audio_seconds = 2.0
        if split == "test":
            continue
        stamps = np.concatenate([np.arange(0, 751, 250), np.arange(1750, 2251, 250)])
        segments = [1] * 4 + [2] * 3
        values = label_path(stamps.size, seed)
        for column, target in enumerate(("valence", "arousal")):
            rows = zip(stamps.tolist(), values[:, column].tolist(), segments, strict=True)
            write_text(
                labels / target / f"{name}.csv",
                "timestamp,value,segment_id",
                *(f"{stamp},{value},{segment}" for stamp, value, segment in rows),
            )
            known: dict[float, float | None] = dict(
                zip((stamps / 1000).tolist(), values[:, column].tolist(), strict=True)
            )
            written.rows[target] = known | {1.0: None, 1.5: None}  # one interval after and before the pause
        write_text(labels / "trustworthiness" / f"{name}.csv", "timestamp,value,segment_id", "0,0.9,1")
    write_text(root / "metadata" / "partition.csv", "Id,Proposal", "1,train", "2,devel", "10,test", "11,train")
    return tree


BUILDERS = {"afew-va": build_afew_va, "recola": build_recola, "sewa": build_sewa, "muse": build_muse}


# --- expected values


def value_at(rows: dict[float, float | None], time: float) -> float:
    """The nearest row's value (of two equally near ones the earlier), at most half an interval away at the ends."""
    stamps = sorted(rows)
    gaps = sorted(b - a for a, b in pairwise(stamps))
    interval = gaps[len(gaps) // 2]
    best = min(stamps, key=lambda stamp: (round(abs(stamp - time), 9), stamp))
    reach = interval if stamps[0] <= time <= stamps[-1] else interval / 2
    value = rows[best]
    return float("nan") if value is None or abs(best - time) > reach + 1e-6 else value


def expected_value(layout: str, written: Written) -> NDArray[np.float64]:
    """[N, 2] labels of every frame, by a loop over frames and rows."""
    value = np.full((written.times.size, 2), np.nan)
    for column, target in enumerate(("valence", "arousal")):
        rows = written.rows.get(target, {})
        for frame, time in enumerate(written.times.tolist()):
            if layout == "afew-va":
                row_value = rows.get(frame)
                value[frame, column] = np.nan if row_value is None else row_value
            elif rows:
                value[frame, column] = value_at(rows, time)
    return value
