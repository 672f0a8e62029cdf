"""Random histories of edits and commands: is every printed number of the data that is there?

    python scripts/random_histories.py --count 2000 --jobs 2       some hours on two cores

Each history is up to ten steps: edit labels, replace, rename or delete a clip, extract, drop, train, kill a training
run, evaluate. Exit code 1 at the first history that ends in a stale number; it is printed step by step.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / name) for name in ("attacks", "faults", "train", "datasets")]
BATCH = 25  # histories per process that forks commands


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="histories")
    parser.add_argument("--steps", type=int, default=10, help="steps of each")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    seeds = [options.seed + k for k in range(-(-options.count // BATCH))]
    done = commands = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for number in pool.map(run_batch, seeds, [options.steps] * len(seeds)):
            done, commands = done + BATCH, commands + number
            print(
                f"{done} histories, {commands} commands, {time.monotonic() - began:.0f} s: no stale number", flush=True
            )


def run_batch(seed: int, steps: int) -> int:
    """Run `BATCH` histories; returns the number of commands. A violated rule raises."""
    from histories import Workshop, machine
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test
    from lab import lab_in

    chosen = settings(
        max_examples=BATCH,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with tempfile.TemporaryDirectory(prefix="vaflow-histories-") as folder, lab_in(Path(folder) / "lab") as lab:
        workshop = Workshop(lab, Path(folder))
        run_state_machine_as_test(seeded(seed)(machine(workshop)), settings=chosen)
        return lab.started


if __name__ == "__main__":
    main()
