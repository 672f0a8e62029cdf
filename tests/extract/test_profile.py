"""The profile adds up and identifies the slowest stage."""

import time

import pytest

from vaflow.extract.loop import COMMITTING, REST, WAITING, Profile, bottleneck


def test_stages_of_the_main_thread_add_up_to_the_wall_time() -> None:
    began = time.perf_counter()
    profile = Profile()
    with profile.measure("encoding x"):
        time.sleep(0.02)
    with profile.measure(COMMITTING):
        time.sleep(0.01)
    stages = profile.stages()
    wall = time.perf_counter() - began
    assert sum(seconds for stage, seconds in stages.items() if stage != COMMITTING) == pytest.approx(wall, abs=5e-3)
    assert stages["encoding x"] >= 0.02
    assert stages[COMMITTING] >= 0.01


def test_waiting_time_ends_when_an_item_arrives() -> None:
    def slow():
        for k in range(3):
            time.sleep(0.01)
            yield k

    profile = Profile()
    items = []
    for item in profile.waiting(slow()):
        items.append(item)
        time.sleep(0.03)
    assert items == [0, 1, 2]
    assert 0.03 <= profile.seconds[WAITING] < 0.09


def test_the_bottleneck_is_reported_with_a_remedy() -> None:
    assert "--workers" in bottleneck({WAITING: 8.0, "encoding clip": 1.0, REST: 1.0, COMMITTING: 50.0})
    assert "which is the best case" in bottleneck({WAITING: 1.0, "encoding clip": 8.0, REST: 1.0, COMMITTING: 0.0})
