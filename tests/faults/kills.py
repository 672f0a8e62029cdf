"""Kill commands at random times and run them again; count lost and repeated work."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from lab import TWO_WORKERS, Lab, Process, assert_printed, assert_same_cache, attempts
from safetensors import safe_open
from synthetic_cache import Toy, make_cache

from vaflow.cache import create_cache, open_cache
from vaflow.train.run_folder import RunFolder
from vaflow.viewer.run_results import read_history

SMALL = ["--set", "hidden=16", "--lr", "3e-3", "--batch-size", "4", "--epochs", "4", "--device", "cpu"]
Kept = Mapping[str, object]


@dataclass(frozen=True)
class Target:
    """A command to kill.

    Attributes:
        name: for the table.
        args: the folder that it writes -> the command.
        kept: that folder -> everything that is safe there, with something that changes when it is made again.
        check: raises unless that folder is what an uninterrupted command writes.
    """

    name: str
    args: Callable[[Path], list[object]]
    kept: Callable[[Path], Kept]
    check: Callable[[Path], None]


@dataclass
class Tally:
    """Result of a kill campaign.

    Attributes:
        kills: commands that were killed before their end.
        kept: what was safe when they were killed, all kills together.
        redone: of that, made again or lost afterwards. Must be 0.
        differing: results that are not those of an uninterrupted command. Must be 0.
        orphans: processes that outlived a killed command. Must be 0.
    """

    name: str = ""
    kills: int = 0
    kept: int = 0
    redone: int = 0
    differing: int = 0
    orphans: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost."""
        return self.redone == self.differing == self.orphans == 0


def table(tallies: Iterable[Tally]) -> str:
    """Format the counts."""
    names = [field.name for field in fields(Tally)]
    rows = [names, *([str(getattr(tally, name)) for name in names] for tally in tallies)]
    return "\n".join(f"{row[0]:<22}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def campaign(lab: Lab, target: Target, folder: Path, kills: int, seed: int) -> Tally:
    """Kill `target` at random times, each time on an empty directory; a third of the resumed runs are killed again.

    Half of the moments are drawn from its whole time, half lie just after something has become safe.
    """
    tally, rng = Tally(target.name), random.Random(seed)
    began = time.monotonic()
    assert_printed(lab.run(target.args(folder / "timed")), 0)
    seconds, parts = time.monotonic() - began, len(target.kept(folder / "timed"))
    number = 0
    while tally.kills < kills:
        number += 1
        out = folder / str(number)
        before: Kept = {}
        for _ in range(1 if rng.random() < 2 / 3 else 2):
            process = lab.start(target.args(out))
            if rng.random() < 0.5:
                _let_run(process, rng.uniform(0, seconds))
            else:
                _let_write(process, target, out, rng.randint(1, parts))
                _let_run(process, rng.uniform(0, 0.05))
            killed, safe = _kill(process, out, target, tally)
            tally.redone += _lost(before, safe)
            tally.kills += killed
            tally.kept += len(safe) if killed else 0
            before = safe
        assert_printed(lab.run(target.args(out)), 0)
        tally.redone += _lost(before, target.kept(out))
        try:
            target.check(out)
        except AssertionError as error:
            print(f"{target.name}, {out}: {error}")
            tally.differing += 1
    return tally


def _let_run(process: Process, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.running():
        time.sleep(0.002)


def _let_write(process: Process, target: Target, out: Path, count: int) -> None:
    while process.running() and len(target.kept(out)) < count:
        time.sleep(0.002)


def _kill(process: Process, out: Path, target: Target, tally: Tally) -> tuple[bool, Kept]:
    process.send(signal.SIGKILL)
    killed = process.wait().code == -signal.SIGKILL
    tally.orphans += len(process.orphans())
    return killed, target.kept(out)


def _lost(before: Kept, after: Kept) -> int:
    return sum(after.get(name) != value for name, value in before.items())


# Commands to kill


def extraction(media: Path, whole: Path, store: str = "zarr") -> Target:
    """`vaflow extract` with the tiny encoders."""

    def args(out: Path) -> list[object]:
        return ["extract", media, "--out", out, "--store", store, *TWO_WORKERS]

    return Target(f"extract, {store}", args, attempts, lambda out: assert_same_cache(out, whole))


def conversion(source: Path, store: str) -> Target:
    """`vaflow cache convert`."""

    def args(out: Path) -> list[object]:
        return ["cache", "convert", source, "--out", out, "--store", store]

    return Target(f"cache convert, {store}", args, attempts, lambda out: assert_same_cache(out, source))


def merging(parts: list[Path], whole: Path) -> Target:
    """`vaflow cache merge`."""

    def args(out: Path) -> list[object]:
        return ["cache", "merge", out, *parts]

    return Target("cache merge", args, attempts, lambda out: assert_same_cache(out, whole))


def training(cache: Path, whole: Path) -> Target:
    """`vaflow train`; its epochs are the committed work, identified by their duration."""

    def args(out: Path) -> list[object]:
        return ["train", cache, "--out", out, *SMALL]

    return Target("train", args, epochs, lambda out: assert_same_run(out, whole))


def epochs(out: Path) -> Kept:
    """Rows of the history: of a finished run, or in the checkpoint of an interrupted one."""
    run = RunFolder(out)
    rows = list(read_history(run.history_file))
    if run.checkpoint_file.is_file() and not rows:
        with suppress(FileNotFoundError), safe_open(run.checkpoint_file, "pt") as file:  # the process has just ended
            rows = json.loads(file.metadata()["progress"])["history"]
    return {f"epoch {row['epoch']:g}": row for row in rows}


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, byte for byte, the same metrics and the same predictions."""
    first, second = RunFolder(one), RunFolder(other)
    assert first.weights_file.read_bytes() == second.weights_file.read_bytes(), (
        "the weights differ from an uninterrupted run"
    )
    assert first.read_metrics() == second.read_metrics(), "the metrics differ from an uninterrupted run"
    names = sorted(path.name for path in second.predictions("val").glob("*.csv"))
    assert names
    for name in names:
        assert (first.predictions("val") / name).read_text() == (second.predictions("val") / name).read_text(), name


# Input data


def toy_cache(path: Path, clips: int = 6) -> Path:
    """A cache to train on, to convert, to merge."""
    third = clips // 3
    return make_cache(path, Toy(splits={"train": clips - third, "val": third}, seconds=(6, 9), store="zarr")).path


def split_cache(source: Path, folder: Path) -> list[Path]:
    """Split its clips into two caches, each with the prompts."""
    whole = open_cache(source)
    parts = []
    for number in range(2):
        part = create_cache(folder / f"part{number}", store=("zarr", "hdf5")[number])
        for info in whole.streams().values():
            part.declare(info)
            for item in whole.items(stream=info.name):
                if info.kind == "text" or hash_of(item) % 2 == number:
                    part.adopt(*whole.committed(info.name, item))
        part.refresh_index()
        parts.append(part.path)
    return parts


def hash_of(item: str) -> int:
    """Return a deterministic value."""
    return sum(map(ord, item))
