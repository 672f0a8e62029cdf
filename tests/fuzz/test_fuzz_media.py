"""A damaged media file is read or rejected with one message; the reading process survives."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_media import MUTATIONS, Case, Result, damaged, read_case
from fuzz_seeds import SEEDS, write_seeds

from vaflow.extract.decoding_pool import Failed, each

ORDINARY, LONG = 100, 2000
HANG = 60.0  # seconds
ROOM = 2**30  # bytes: damage must not make a small file large


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of every kind."""
    return write_seeds(tmp_path_factory.mktemp("seeds"))


def assert_all_end_well(cases: list[Case]) -> None:
    results = dict(each(read_case, cases, workers=2, item_timeout=HANG))
    assert len(results) == len(cases)
    wrong = {
        cases[k].number: result.message if isinstance(result, Failed) else result.detail
        for k, result in results.items()
        if isinstance(result, Failed) or result.outcome not in ("read", "refused")
    }
    assert not wrong, f"python scripts/fuzz.py --seed {cases[0].seed} --only {next(iter(wrong))}: {wrong}"
    good = [result for result in results.values() if isinstance(result, Result)]
    assert max(result.peak for result in good) < ROOM
    assert {result.outcome for result in good} == {"read", "refused"}


def test_damaged_media_are_read_or_rejected(seeds: Path) -> None:
    assert_all_end_well([Case(0, number, seeds) for number in range(ORDINARY)])


@pytest.mark.slow
def test_thousands_of_damaged_media_are_read_or_rejected(seeds: Path) -> None:
    assert_all_end_well([Case(1, number, seeds) for number in range(LONG)])


def _whole(case: Case) -> Result:
    """A case without damage."""
    import fuzz_media

    fuzz_media.damaged = lambda case: (
        sorted(SEEDS)[case.number],
        (case.seeds / sorted(SEEDS)[case.number]).read_bytes(),
    )
    return read_case(case)


def test_every_undamaged_file_is_read(seeds: Path) -> None:
    """The undamaged files must be readable, or the cases above prove nothing."""
    cases = [Case(0, number, seeds) for number in range(len(SEEDS))]
    results = dict(each(_whole, cases, workers=1, item_timeout=HANG))
    outcomes = {sorted(SEEDS)[k]: r.outcome if isinstance(r, Result) else r.message for k, r in results.items()}
    assert outcomes == dict.fromkeys(SEEDS, "read")


def test_fuzz_cases_are_reproducible(seeds: Path) -> None:
    for number in range(40):
        assert damaged(Case(3, number, seeds)) == damaged(Case(3, number, seeds))
    assert damaged(Case(3, 0, seeds)) != damaged(Case(4, 0, seeds))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_changes_something(mutation: Callable[..., None], seeds: Path) -> None:
    import random

    whole = (seeds / "sound.wav").read_bytes()
    changed = 0
    for number in range(20):
        data = bytearray(whole)
        mutation(data, random.Random(number), seeds)
        changed += bytes(data) != whole
    assert changed >= 15


def _plant(case: Case) -> Result:
    """A reader with planted bugs that the campaign must detect."""
    import os
    import signal
    import time

    import fuzz_media

    def broken(*_: object) -> tuple[str, str]:
        if case.number == 0:
            raise KeyError("planted")
        if case.number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.number == 2:
            time.sleep(3600)
        if case.number == 3:
            return "read", str(len(bytearray(5 * 2**30)))  # more than a decoding process may take
        return "read", ""

    fuzz_media._read = broken  # type: ignore[assignment]
    return read_case(case)


def test_the_fuzz_harness_detects_bugs_crashes_hangs_and_memory_growth(seeds: Path) -> None:
    cases = [Case(0, number, seeds) for number in range(5)]
    outcomes = dict(each(_plant, cases, workers=2, item_timeout=4.0))
    bug, crash, hang, hunger, good = (outcomes[k] for k in range(5))
    assert isinstance(bug, Result)
    assert bug.outcome == "bug"
    assert "planted" in bug.detail
    assert isinstance(crash, Failed)
    assert crash.error == "WorkerDied"
    assert isinstance(hang, Failed)
    assert hang.error == "WorkerHung"
    assert isinstance(hunger, Result)
    assert hunger.outcome == "system"
    assert isinstance(good, Result)
    assert good.outcome == "read"
