"""Planning of a second run: from the index if nothing changed, from records otherwise."""

import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.layout import source_stamp
from vaflow.cache.schema import Array, StreamInfo
from vaflow.datasets import Dataset, open_dataset
from vaflow.errors import CorruptError
from vaflow.extract import durations
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.estimate import estimate
from vaflow.extract.plan import Plan, make_plan
from vaflow.extract.source_files import file_status, sources_of
from vaflow.extract.streams import source_of

STREAMS = {
    info.name: info
    for info in (
        StreamInfo("logmel", "logmel", 128, "float16"),
        StreamInfo("clip-tiny", "visual", 128, "float16"),
        StreamInfo("labels", "labels", 0, "float32"),
    )
}
CONFIG = ExtractConfig(visual=("clip-tiny",), audio=())


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Five files named like videos, of different sizes, one with labels."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(5):
        (root / f"clip{number}.mp4").write_bytes(bytes(100 + number))
    (root / "clip1.csv").write_text("time,valence,arousal\n0,0.1,0.2\n")
    return open_dataset(root, "videos")


@pytest.fixture
def cache(dataset: Dataset, tmp_path: Path) -> Cache:
    """Records of all clips without arrays; planning reads only sources."""
    made = create_cache(tmp_path / "cache", store="hdf5")
    arrays: dict[str, dict[str, Array]] = {
        "logmel": {"embedding": np.zeros((0, 128), np.float16)},
        "clip-tiny": {"embedding": np.zeros((0, 128), np.float16)},
        "labels": {"value": np.zeros((0, 2), np.float32)},
    }
    for info in STREAMS.values():
        made.declare(info)
        valid = np.zeros((0, 2) if info.name == "labels" else 0, bool)
        for clip in dataset.clips:
            source = source_of(info.kind, sources_of(clip))
            made.write(info.name, clip.id, arrays[info.name] | {"time": np.zeros(0), "valid": valid}, source=source)
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Names of the records that were read."""
    calls: list[tuple[str, str]] = []
    real = Cache.record

    def record(self: Cache, stream: str, item: str) -> object:
        calls.append((stream, item))
        return real(self, stream, item)

    monkeypatch.setattr(Cache, "record", record)
    return calls


def plan(cache: Cache, dataset: Dataset) -> Plan:
    return make_plan(open_cache(cache.path, writable=True), STREAMS, dataset.clips, Shard())


@pytest.mark.parametrize("indexed", [True, False])
def test_planning_without_changes_reads_only_the_index(
    indexed: bool, cache: Cache, dataset: Dataset, read: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if indexed:
        cache.refresh_index()
    monkeypatch.setattr(durations, "header_seconds", lambda path: pytest.fail(f"{path} was opened"))
    planned = plan(cache, dataset)
    assert (planned.tasks, planned.done) == ((), 5)
    assert read == []


def test_touched_files_are_compared_and_changed_files_extracted_again(
    cache: Cache, dataset: Dataset, read: list
) -> None:
    cache.refresh_index()
    touched, changed = dataset.root / "clip2.mp4", dataset.root / "clip3.mp4"
    os.utime(touched, ns=(1, 1))
    changed.write_bytes(bytes(102) + b"x")
    planned = plan(cache, dataset)
    assert [(task.clip.id, task.streams, task.changed) for task in planned.tasks] == [("clip3", tuple(STREAMS), True)]
    assert {item for _, item in read} == {"clip2", "clip3"}


def test_changed_labels_rewrite_only_the_labels(cache: Cache, dataset: Dataset) -> None:
    (dataset.root / "clip1.csv").write_text("time,valence,arousal\n0,0.3,0.2\n")
    planned = plan(cache, dataset)
    assert [(task.clip.id, task.streams) for task in planned.tasks] == [("clip1", ("labels",))]


def test_a_new_split_rewrites_the_labels(cache: Cache, dataset: Dataset) -> None:
    moved = replace(dataset, clips=tuple(replace(clip, split="val") for clip in dataset.clips[:1]))
    assert [task.streams for task in plan(cache, moved).tasks] == [("labels",)]


def test_a_dropped_item_is_extracted_again(cache: Cache, dataset: Dataset) -> None:
    cache.refresh_index()
    cache.drop("clip-tiny", "clip4")
    assert [(task.clip.id, task.streams) for task in plan(cache, dataset).tasks] == [("clip4", ("clip-tiny",))]


def test_a_deleted_video_counts_as_changed(cache: Cache, dataset: Dataset) -> None:
    (dataset.root / "clip0.mp4").unlink()
    assert [task.clip.id for task in plan(cache, dataset).tasks] == ["clip0"]


def test_a_damaged_record_raises_when_it_is_read(cache: Cache, dataset: Dataset) -> None:
    path = cache.layout.record("clip-tiny", "clip2")
    path.write_bytes(path.read_bytes().replace(b'"clip-tiny"', b'"clip-tinY"'))
    with pytest.raises(CorruptError, match="repair"):
        plan(cache, dataset)
    others = replace(dataset, clips=tuple(clip for clip in dataset.clips if clip.id != "clip2"))
    assert plan(cache, others).done == 4


def test_the_quick_fingerprint_excludes_content_digests(dataset: Dataset) -> None:
    for clip in dataset.clips:
        whole, quick = sources_of(clip), sources_of(clip, file_status)
        assert source_stamp(whole) == source_stamp(quick)
        assert whole != quick
    first, second = (sources_of(clip) for clip in dataset.clips[:2])
    assert source_stamp(first) != source_stamp(second)
    assert source_stamp({"dimensions": {"arousal": {"size": 1, "blake2b": "a"}}}) == source_stamp(
        {"dimensions": {"arousal": {"size": 1, "blake2b": "b"}}}
    )


def test_the_estimate_uses_ffmpeg_only_without_header_duration(dataset: Dataset, tmp_path: Path) -> None:
    """One header states 40 s; four files of zeros are sent to FFmpeg, which cannot read them."""
    movie = struct.pack(">4x8xII", 1000, 40_000) + bytes(80)
    header = struct.pack(">I4s", 8 + len(movie), b"mvhd") + movie
    whole = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 8 + len(header), b"moov") + header
    (dataset.root / "clip0.mp4").write_bytes(whole)
    guess = estimate(dataset, tmp_path / "none", CONFIG, Shard())
    assert (guess["items"], guess["items_unreadable"]) == (5, 4)
    assert guess["hours"] == round(40 / 3600, 3)
    assert guess["frames_to_encode"] == len(CONFIG.grid.sample_ticks(40.0))
