"""Fixtures that every part of the suite may use."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see vaflow.cli.main

# A shell that starts the suite in the background has it ignore Ctrl-C, and all its children: tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that measure time, use all cores or kill processes by load: they run alone, in one process.
SERIAL = (
    "extract/test_ray.py",
    "extract/test_item_timeout.py",
    "extract/test_long_clips.py",
    "faults/test_faults_system.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SERIAL`."""
    for item in items:
        if item.path.as_posix().endswith(SERIAL):
            item.add_marker(pytest.mark.serial)


@pytest.fixture(autouse=True)
def default_log_level() -> Iterator[None]:
    """Undo the log level that a command has set, in this process or in a fixture: `caplog` depends on it."""
    logger = logging.getLogger("vaflow")
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(logging.NOTSET)


CLIPS_VARIABLE = "VAFLOW_TEST_CLIPS"


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips that `scripts/fetch_clips.py` fills; tests that need it skip without it."""
    folder = os.environ.get(CLIPS_VARIABLE)
    if not folder:
        pytest.skip(f"{CLIPS_VARIABLE} is not set: run `python scripts/fetch_clips.py DIR` and point it there")
    path = Path(folder).resolve()  # commands are run in other folders, too
    if not (path / "obama.mp4").is_file():
        pytest.fail(f"{CLIPS_VARIABLE}={folder} holds no clips: run `python scripts/fetch_clips.py {folder}`")
    return path
