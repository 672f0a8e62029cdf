"""Damage one media file and read it with everything that reads media.

Case k of a seed is always the same file. It is made and read in a decoding process, as data sets are.
"""

import random
import shutil
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_seeds import AUDIO_FILES, FILMS, IMAGE_FILES, SEEDS, WHOLE_FILM

from vaflow.cache.schema import StreamInfo, array_problems
from vaflow.datasets import Clip
from vaflow.encoders.preprocessing import Preparation
from vaflow.errors import MediaError
from vaflow.extract.decoding_pool import AudioBlock, Clock, Done, Face, Failed, Job
from vaflow.extract.doctor import check_clip
from vaflow.extract.worker import run_job
from vaflow.timeline import Grid

LABELS = StreamInfo("labels", "labels", 0, "float32")
REFUSED = {"MediaError", "DataError"}
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 16384, 50000)
MOST_BYTES = 4 * 2**20
Data = bytearray


@dataclass(frozen=True)
class Case:
    """Which file: mutation `number` of `seed`, made from the whole files in `seeds`."""

    seed: int
    number: int
    seeds: Path


@dataclass(frozen=True)
class Result:
    """Result of a case.

    Attributes:
        name: of the whole file that was damaged.
        outcome: "read", "refused" (an error of ours with a message), "system" (another expected error: no memory) or
            "bug" (anything else).
        what: the error's class and message, or the traceback.
        seconds: it took; peak: most memory of the process meanwhile, in bytes.
    """

    name: str
    outcome: str
    detail: str
    seconds: float
    peak: int


# --- mutations


def flip_bits(data: Data, chance: random.Random, _: Path) -> None:
    for _number in range(chance.choice((1, 1, 2, 8, 64))):
        data[_position(data, chance)] ^= 1 << chance.randrange(8)


def write_number(data: Data, chance: random.Random, _: Path) -> None:
    """Replace integers (sizes, counts, rates, dimensions) in either byte order."""
    for _number in range(chance.choice((1, 1, 3))):
        width = chance.choice("BHIQ")
        size = struct.calcsize(width)
        value = chance.choice((chance.choice(INTERESTING), chance.getrandbits(8 * size))) % (1 << 8 * size)
        at = _position(data, chance)
        data[at : at + size] = struct.pack(chance.choice("<>") + width, value)


def cut_off(data: Data, chance: random.Random, _: Path) -> None:
    del data[chance.randrange(len(data) + 1) :]


def cut_out(data: Data, chance: random.Random, _: Path) -> None:
    at = _position(data, chance)
    del data[at : at + chance.choice((1, 4, 100, 5000))]


def repeat(data: Data, chance: random.Random, _: Path) -> None:
    at, size = _position(data, chance), chance.choice((1, 8, 200, 5000))
    data[at:at] = data[at : at + size] * chance.choice((1, 2, 20))


def insert_noise(data: Data, chance: random.Random, _: Path) -> None:
    at = _position(data, chance)
    data[at:at] = chance.randbytes(chance.choice((1, 4, 64, 3000)))


def overwrite(data: Data, chance: random.Random, _: Path) -> None:
    at, size = _position(data, chance), chance.choice((4, 64, 3000))
    data[at : at + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))


def splice_header(data: Data, chance: random.Random, seeds: Path) -> None:
    """Replace the start by that of another file format."""
    other = (seeds / chance.choice(sorted(SEEDS))).read_bytes()
    size = chance.choice((4, 12, 64, 600, len(other) // 2))
    data[: size if chance.random() < 0.7 else 0] = other[:size]


def swap(data: Data, chance: random.Random, _: Path) -> None:
    size = chance.choice((4, 16, 400))
    one, other = _position(data, chance), _position(data, chance)
    first, second = data[one : one + size], data[other : other + size]
    data[one : one + size], data[other : other + size] = second, first


MUTATIONS: tuple[Callable[[Data, random.Random, Path], None], ...] = (
    flip_bits,
    write_number,
    cut_off,
    cut_out,
    repeat,
    insert_noise,
    overwrite,
    splice_header,
    swap,
)


def _position(data: Data, chance: random.Random) -> int:
    """A position, more often in headers and indexes at both ends than in frames."""
    size = max(len(data), 1)
    near = min(size, 1200)
    return chance.choice((chance.randrange(near), size - 1 - chance.randrange(near), chance.randrange(size)))


def damaged(case: Case) -> tuple[str, bytes]:
    """(name of the whole file, the damaged one's bytes)."""
    chance = random.Random(f"{case.seed}-{case.number}")
    name = sorted(SEEDS)[case.number % len(SEEDS)]
    data = Data((case.seeds / name).read_bytes())
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(MUTATIONS)(data, chance, case.seeds)
    return name, bytes(data[:MOST_BYTES])


# --- reading


def read_case(case: Case) -> Result:
    """Make the file and read it as `vaflow extract` and `vaflow check` do. Runs in a decoding process."""
    name, data = damaged(case)
    _forget_peak()
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="vaflow-fuzz-"))
    try:
        outcome, detail = _read(clip_of(name, data, folder, case.seeds), case.number)
    except MemoryError:
        outcome, detail = "system", "MemoryError"
    except Exception:  # noqa: BLE001 - the very thing that is looked for
        outcome, detail = "bug", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(name, outcome, detail, time.perf_counter() - began, _peak())


def clip_of(name: str, data: bytes, folder: Path, seeds: Path) -> Clip:
    """A clip with one damaged file: video, audio, crop or frame."""
    if name in FILMS:
        path = folder / name
        path.write_bytes(data)
        return Clip("clip", "train", "clip", path, path)
    if name in AUDIO_FILES:
        path = folder / name
        path.write_bytes(data)
        return Clip("clip", "train", "clip", seeds / WHOLE_FILM, path)
    assert name in IMAGE_FILES
    path = folder / f"00001{Path(name).suffix}"
    path.write_bytes(data)
    if len(data) % 2:
        return Clip("clip", "train", "clip", seeds / WHOLE_FILM, None, (folder,))
    return Clip("clip", "train", "clip", None, frames=folder, frame_rate=25.0)


def _read(clip: Clip, number: int) -> tuple[str, str]:
    messages: list[Any] = []
    job = Job(0, clip, Grid(), True, True, "auto" if clip.crops else "none", (Preparation(32),), True)
    run_job(job, messages.append)
    check_clip(clip)
    last = messages[-1]
    if isinstance(last, Failed):
        assert last.message, "an error without a message"
        assert len(last.message.splitlines()) == 1, last.message
        return ("refused" if last.error in REFUSED else "system"), f"{last.error}: {last.message}"
    assert isinstance(last, Done)
    _assert_consistent(messages)
    return "read", ""


def _assert_consistent(messages: list[Any]) -> None:
    """Assert that the messages can be stored in a cache."""
    (clock,) = (message for message in messages if isinstance(message, Clock))
    problems = array_problems(LABELS, clock.labels)
    assert not problems, problems
    assert 0 < clock.duration <= 25 * 3600
    samples = np.concatenate([m.samples for m in messages if isinstance(m, AudioBlock)] or [np.zeros(0, np.float32)])
    assert np.isfinite(samples).all()
    assert samples.size <= round(clock.duration * 16000) + 1
    for face in (message for message in messages if isinstance(message, Face)):
        assert {image.shape for image in face.images.values()} == {(32, 32, 3)}


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Peak memory of this process since `_forget_peak`, or since its start if the system cannot reset it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def refused_or_read(result: object) -> bool:
    """Allowed outcomes of a case."""
    return isinstance(result, Result) and result.outcome in ("read", "refused")


__all__ = ["Case", "MediaError", "Result", "damaged", "read_case", "refused_or_read"]
