"""Random histories of edits and commands never print a score of outdated data."""

from pathlib import Path

import pytest
from histories import machine
from history_model import Workshop
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from lab import Lab

HISTORIES = 12  # here; `scripts/random_histories.py` runs 2,000


@pytest.mark.parametrize("seed", [0])
def test_printed_scores_belong_to_the_current_data(lab: Lab, tmp_path: Path, seed: int) -> None:
    chosen = settings(
        max_examples=HISTORIES,
        stateful_step_count=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine(Workshop(lab, tmp_path)), settings=chosen)
