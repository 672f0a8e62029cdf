"""Long fault campaign: repeats the fault tests many times and prints one table.

    python scripts/faults.py kills --kills 30       about a quarter of an hour on two cores
    python scripts/faults.py flips                  every bit of every file of a small cache, in both stores

Exit code 1 where anything was lost.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / name) for name in ("faults", "train", "datasets", "cache")]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "flips"))
    parser.add_argument("--kills", type=int, default=30, help="kills per command (30)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vaflow-faults-") as folder:
        clean = kills(Path(folder), options.kills, options.seed) if options.what == "kills" else flips(Path(folder))
    print(f"\n{time.monotonic() - began:.0f} s. " + ("lost: 0" if clean else "LOST ITEMS: see above"))
    raise SystemExit(not clean)


def kills(folder: Path, count: int, seed: int) -> bool:
    """`kill -9` at random moments of every command that writes, then the same command again."""
    from kills import campaign, conversion, extraction, merging, split_cache, table, toy_cache, training
    from lab import EXTRACT, assert_printed, lab_in
    from media import write_media

    with lab_in(folder / "lab") as lab:
        media = write_media(folder / "media", 8)
        whole = {store: folder / f"whole-{store}" for store in ("zarr", "hdf5")}
        for store, out in whole.items():
            assert_printed(lab.run(["extract", media, "--out", out, "--store", store, *EXTRACT]), 0)
        toys = toy_cache(folder / "toys", 24)
        train = training(toys, folder / "run")
        assert_printed(lab.run(train.args(folder / "run")), 0)
        targets = [
            *(extraction(media, out, store) for store, out in whole.items()),
            *(conversion(toys, store) for store in ("zarr", "hdf5")),
            merging(split_cache(toys, folder), toys),
            train,
        ]
        tallies = []
        for number, target in enumerate(targets):
            tallies.append(campaign(lab, target, folder / f"campaign{number}", count, seed + number))
            print(table(tallies[-1:]), flush=True)
    print(f"\n{table(tallies)}")
    return all(tally.clean for tally in tallies)


def flips(folder: Path) -> bool:
    """Flip every bit of every committed file, one at a time; `verify` must find each."""
    from flips import every_flip

    missed = 0
    for store in ("zarr", "hdf5"):
        tried, lost = every_flip(folder / store, store)
        print(f"{store}: {tried} bits flipped, {len(lost)} not found", *lost[:10], sep="\n  ", flush=True)
        missed += len(lost)
    return not missed


if __name__ == "__main__":
    main()
