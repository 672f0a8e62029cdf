"""Random histories of edits and commands: is every printed number of the data that is in the cache?

    python scripts/random_histories.py --count 2000 --jobs 2       half an hour on two free cores

Each history is up to ten steps: edit labels, add, replace, rename or delete a clip, extract, drop, train, evaluate,
kill an extraction or a training run. Exit code 1 at the first history that ends in a wrong number; its steps are
printed. Folders are made in memory where the system has /dev/shm.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / name) for name in ("attacks", "faults", "train", "datasets")]
BATCH = 25  # histories of one seed

if TYPE_CHECKING:
    from history_model import Workshop


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="histories")
    parser.add_argument("--steps", type=int, default=10, help="steps of each")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the first 25 histories; the next 25 have the next one")
    options = parser.parse_args()
    began = time.monotonic()
    seeds = [options.seed + k for k in range(-(-options.count // BATCH))]
    done = commands = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(run_batch, seed, options.steps): seed for seed in seeds}
        for future in as_completed(futures):
            if future.exception():  # otherwise the remaining histories run before the error is printed
                pool.shutdown(wait=False, cancel_futures=True)
            done, commands = done + BATCH, commands + future.result()
            seconds = time.monotonic() - began
            print(
                f"seed {futures[future]}: {done} histories, {commands} commands, {seconds:.0f} s: no wrong number",
                flush=True,
            )


@cache
def workshop() -> "Workshop":
    """The workshop of this process; its folder is in memory where the system has /dev/shm."""
    from history_model import Workshop
    from lab import lab_in

    opened = ExitStack()
    Finalize(None, opened.close, exitpriority=1)  # in a process of a pool, `atexit` does nothing
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="vaflow-histories-", dir=memory))
    return Workshop(opened.enter_context(lab_in(Path(folder) / "lab")), Path(folder))


def run_batch(seed: int, steps: int) -> int:
    """Run `BATCH` histories; returns the number of commands. A violated rule raises."""
    from histories import machine
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    chosen = settings(
        max_examples=BATCH,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    before = workshop().lab.started
    run_state_machine_as_test(seeded(seed)(machine(workshop())), settings=chosen)
    return workshop().lab.started - before


if __name__ == "__main__":
    main()
