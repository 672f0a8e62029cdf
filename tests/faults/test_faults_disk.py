"""Full, read-only and removed disks: a clear message, committed items stay, the next run resumes."""

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kills import SMALL, assert_same_run, split_cache
from lab import EXTRACT, Ended, Lab, assert_printed, assert_same_cache, attempts

from vaflow.cache import is_cache, open_cache
from vaflow.cache.maintenance import verify
from vaflow.cache.schema import Rows
from vaflow.cache.stores import Hdf5Store

UNPRIVILEGED = "from strikes import *; no_privilege()"  # root would bypass permissions


class Disk:
    """A separate file system whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        shown = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], capture_output=True, text=True
        )
        if shown.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {shown.stderr.strip()}")

    def resize(self, kilobytes: int) -> None:
        """Set the size of the file system."""
        subprocess.run(["mount", "-o", f"remount,rw,size={kilobytes}k", self.path], check=True)

    def clear(self) -> None:
        """Delete all files."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    small = Disk(tmp_path / "disk")
    yield small
    subprocess.run(["umount", "-l", small.path], check=True)


def assert_refused(ended: Ended, *words: str) -> None:
    """Assert the system's error and a remedy; exit code 2 if the command could not start."""
    assert ended.code in (1, 2), ended
    assert_printed(ended, ended.code, *words)


def fill_up(lab: Lab, disk: Disk, args: list[object], out: Path, sizes: tuple[int, ...]) -> int:
    """Run the command on disks of each size, then with enough space; return the number of items kept."""
    kept: dict[str, str] = {}
    for size in sizes:
        disk.clear()
        disk.resize(size)
        process = lab.start(args)
        assert_refused(process.wait(), "No space left")
        assert process.orphans() == []
        kept = attempts(out)
        if is_cache(out):
            assert verify(open_cache(out)) == [], size
    disk.resize(64_000)
    assert_printed(lab.run(args), 0)
    assert kept.items() <= attempts(out).items(), "committed items were written again"
    return len(kept)


def test_hdf5_on_a_full_disk_is_complete_or_rejected(disk: Disk) -> None:
    """Without protection, libhdf5 crashes the process if the disk is full when it closes a file."""
    arrays: dict[str, Rows] = {name: np.arange(1000.0) for name in ("a", "b", "c")}
    refused = 0
    for size in range(4, 100, 4):
        disk.clear()
        disk.resize(size)
        folder = disk.path / "item"
        try:
            folder.mkdir()
            Hdf5Store().write_attempt(folder, "attempt", arrays)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
    assert 0 < refused < 24


def test_a_full_disk_stops_extraction_cleanly(lab: Lab, disk: Disk, media: Path, whole: Path) -> None:
    out = disk.path / "cache"
    kept = fill_up(lab, disk, ["extract", media, "--out", out, *EXTRACT], out, (16, 100, 500))
    assert kept > 0
    assert_same_cache(out, whole)


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_a_full_disk_stops_conversion_cleanly(lab: Lab, disk: Disk, toys: Path, store: str) -> None:
    out = disk.path / "cache"
    kept = fill_up(lab, disk, ["cache", "convert", toys, "--out", out, "--store", store], out, (16, 60, 150))
    assert kept > 0
    assert_same_cache(out, toys)


def test_a_full_disk_stops_merge_cleanly(lab: Lab, disk: Disk, toys: Path, tmp_path: Path) -> None:
    out = disk.path / "cache"
    parts = split_cache(toys, tmp_path)
    assert fill_up(lab, disk, ["cache", "merge", out, *parts], out, (40, 150)) > 0
    assert_same_cache(out, toys)


def test_a_full_disk_stops_training_cleanly(lab: Lab, disk: Disk, toys: Path, whole_run: Path) -> None:
    out = disk.path / "run"
    args = ["train", toys, "--out", out, *SMALL]
    for size in (4, 40, 100, 200):
        disk.resize(size)
        assert_refused(lab.run(args), "No space left")
    disk.resize(64_000)
    assert_printed(lab.run(args), 0)
    assert_same_run(out, whole_run)


def test_a_disk_that_becomes_read_only_is_reported(lab: Lab, disk: Disk, media: Path, whole: Path) -> None:
    """A file system becomes read-only after it detects an error."""
    disk.resize(64_000)
    out = disk.path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    fault = f"strike('vaflow.cache.cache.Cache.write', 9, run, 'mount -o remount,ro {disk.path}')"
    assert_refused(lab.run(args, f"from strikes import *; {fault}"), "Read-only file system")
    assert verify(open_cache(out)) == []
    kept = attempts(out)
    assert len(kept) > 4
    disk.resize(64_000)
    assert_printed(lab.run(args), 0)
    assert kept.items() <= attempts(out).items()
    assert_same_cache(out, whole)


@pytest.mark.parametrize("at", [2, 9])
def test_extraction_reports_lost_permission(lab: Lab, media: Path, whole: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    fault = f"strike('vaflow.cache.cache.Cache.write', {at}, run, 'chmod -R a-w {out}')"
    assert_refused(lab.run(args, f"{UNPRIVILEGED}; {fault}"), "Permission denied", "the same command again")
    assert verify(open_cache(out)) == []
    kept = attempts(out)
    subprocess.run(["chmod", "-R", "u+w", out], check=True)
    assert_printed(lab.run(args), 0)
    assert kept.items() <= attempts(out).items()
    assert_same_cache(out, whole)


@pytest.mark.parametrize(
    "stage", ["train.training_loop.train_step", "train.training_loop.write_tensors", "train.session.write_evaluation"]
)
def test_training_reports_lost_permission(lab: Lab, toys: Path, whole_run: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "run"
    args = ["train", toys, "--out", out, *SMALL]
    fault = f"strike('vaflow.{stage}', 1, run, 'chmod -R a-w {out}')"
    assert_refused(lab.run(args, f"{UNPRIVILEGED}; {fault}"), "Permission denied")
    subprocess.run(["chmod", "-R", "u+w", out], check=True)
    assert_printed(lab.run(args), 0)
    assert_same_run(out, whole_run)


def commands_into(out: Path, media: Path, toys: Path, run: Path) -> list[list[object]]:
    """Run every writing command on a read-only directory."""
    return [
        ["extract", media, "--out", out / "cache", *EXTRACT],
        ["cache", "convert", toys, "--out", out / "cache", "--store", "hdf5"],
        ["cache", "merge", out / "cache", toys],
        ["cache", "import", out / "cache", "--stream", "mine", "--kind", "visual", "--from", media],
        ["train", toys, "--out", out / "run", *SMALL],
        ["predict", run, media / "clip0.mp4", "--out", out / "predictions"],
        ["ablate", toys, "--table", "extra", "--seeds", "1", "--out", out / "study"],
        ["ensemble", run, "--out", out / "ensemble"],
        ["submit", run, "--sample", toys, "--out", out / "submission.txt"],
        ["export", run, out / "shared"],
        ["report", run, "--out", out / "report.html"],
        ["labels", "agree", media, "--out", out / "labels"],
        ["demo", "--out", out / "demo"],
    ]


def test_every_command_rejects_a_read_only_directory(
    lab: Lab, media: Path, toys: Path, whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shut"
    out.mkdir()
    out.chmod(0o555)
    for args in commands_into(out, media, toys, whole_run):
        ended = lab.run(args, UNPRIVILEGED)
        assert ended.code == 2, f"{args}: {ended}"
        assert "Traceback" not in ended.err, f"{args}: {ended}"
        assert len(ended.err.strip().splitlines()) <= 2, f"{args}: {ended.err}"
    assert list(out.iterdir()) == []
