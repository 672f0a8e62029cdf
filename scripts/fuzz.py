"""Read thousands of damaged media files and malicious text files, and count the outcomes.

python scripts/fuzz.py --count 2000 --seed 0
python scripts/fuzz.py --texts --count 2000      texts, documents and arrays, so many of each family

Every case must end in arrays that a cache takes or in an error of ours with a message, without a crash, a hang or
unbounded memory. Exits with 1 where one does not, and says how to make it again: --only NUMBER --keep DIR.
"""

import argparse
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

import hypothesis
from fuzz_media import Case, Result, damaged, read_case
from fuzz_seeds import write_seeds
from fuzz_texts import Family, families
from fuzz_texts import outcome_of as outcome_of_text

from vaflow.extract.decoding_pool import Failed, each

WORKERS = 2
OUTCOMES = ("read", "refused", "system", "bug", "crash", "hang")


def main() -> int:
    """Read all cases; print the tally; returns the exit code."""
    options = _options()
    if options.texts:
        return _texts(options.count, options.seed)
    with tempfile.TemporaryDirectory(prefix="vaflow-fuzz-seeds-") as folder:
        seeds = write_seeds(Path(folder))
        numbers = range(options.count) if options.only is None else [options.only]
        cases = [Case(options.seed, number, seeds) for number in numbers]
        if options.keep is not None:
            _keep(cases, options.keep)
        began = time.perf_counter()
        results = dict(each(read_case, cases, workers=options.workers, item_timeout=options.item_timeout))
        seconds = time.perf_counter() - began
    return _report([(cases[k], results[k]) for k in sorted(results)], seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", action="store_true", help="text files instead of media")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--item-timeout", type=float, default=20.0, help="limit without progress in seconds (20)")
    parser.add_argument("--only", type=int, help="run only this case")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files")
    return parser.parse_args()


def _keep(cases: Iterable[Case], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        name, data = damaged(case)
        (folder / f"{case.seed}-{case.number}-{name}").write_bytes(data)


def _texts(count: int, seed: int) -> int:
    """Every family of texts; hypothesis shrinks and shows what ends otherwise."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="vaflow-fuzz-") as folder:
        for name, family in families().items():
            began, tally = time.perf_counter(), Counter[str]()
            try:
                _examples(family, Path(folder) / "case", count, seed, tally)
            except Exception:  # noqa: BLE001 - the very thing that is looked for
                bad += 1
                traceback.print_exc()
            counts = ", ".join(f"{many} {detail}" for detail, many in sorted(tally.items()))
            print(f"{name:20} {counts}; {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{bad} families with bugs; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return 1 if bad else 0


def _examples(family: Family, folder: Path, count: int, seed: int, tally: Counter[str]) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(family.examples)
    def every(example: object) -> None:
        tally[outcome_of_text(family.read, folder, example)] += 1

    every()


def outcome_of(result: Result | Failed) -> str:
    """As in `OUTCOMES`."""
    if isinstance(result, Result):
        return result.outcome
    return "hang" if result.error == "WorkerHung" else "crash"


def _report(results: list[tuple[Case, Result | Failed]], seconds: float) -> int:
    tally = Counter(outcome_of(result) for _, result in results)
    print(f"{len(results)} cases in {seconds:.0f} s: " + ", ".join(f"{tally[name]} {name}" for name in OUTCOMES))
    done = [(case.number, result) for case, result in results if isinstance(result, Result)]
    whole = [result for _, result in done]
    by_file = Counter((result.name, result.outcome) for result in whole)
    for name in sorted({result.name for result in whole}):
        print(f"  {name:16}", ", ".join(f"{by_file[name, o]} {o}" for o in OUTCOMES if by_file[name, o]))
    if whole:
        number, slowest = max(done, key=lambda pair: pair[1].seconds)
        print(f"slowest case: {slowest.seconds:.2f} s (case {number}, {slowest.name})")
        number, largest = max(done, key=lambda pair: pair[1].peak)
        print(f"peak memory of a decoding process: {largest.peak / 2**20:.0f} MiB (case {number}, {largest.name})")
    errors = Counter(result.detail.split(": ")[0] for result in whole if result.outcome == "refused")
    print("errors: " + (", ".join(f"{count} {name}" for name, count in errors.most_common()) or "none"))
    bad = [(case, result) for case, result in results if outcome_of(result) in ("system", "bug", "crash", "hang")]
    for case, result in bad:
        print(f"\nseed {case.seed}, case {case.number}: {outcome_of(result)}")
        print(result.detail if isinstance(result, Result) else result.message)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
