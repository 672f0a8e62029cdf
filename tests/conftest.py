"""Fixtures that every part of the suite may use."""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vaflow.process

if TYPE_CHECKING:
    from lab import Lab

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see vaflow.cli.main
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or torch starts processes that compile, and import torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes of the suite share the cores

# A shell that starts the suite in the background has it ignore Ctrl-C, and all its children: tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MEMORY = Path("/dev/shm")
MEMORY_NEEDED, PROCESSES_NEED = 4 * 2**30, 8 * 2**30  # bytes: files of the whole suite, and its processes

DRAWING = (
    "test_plots.py",
    "test_run_data.py",
    "test_demo_run.py",
    "test_uncertainty_pages.py",
)  # files whose tests look at figures

# The files that take longest, longest first: a process that starts one of them last would finish alone.
SLOWEST = (
    "test_ray_cluster.py",
    "test_together.py",
    "test_docs.py",
    "test_ablate_study.py",
    "test_faults_disk.py",
    "test_finetune_run.py",
    "test_faults_kill.py",
    "test_finetune_step.py",
    "test_demo_run.py",
    "test_faults_signals.py",
    "test_environments.py",
    "test_device_rehearsal.py",
    "test_pipeline.py",
    "test_page_quality.py",
    "test_cache_people.py",
    "test_cli_extract.py",
    "test_run_data.py",
    "test_alignment.py",
    "test_item_timeout.py",
    "test_view_media.py",
    "test_rating.py",
    "test_histories.py",
    "test_faults_system.py",
    "test_detection_torch.py",
    "test_huggingface.py",
    "test_search.py",
    "test_estimate.py",
    "test_any_encoder_cli.py",
    "test_viewer_page.py",
    "test_site.py",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process more than cores for the whole suite; none for chosen files, which end sooner than processes start.

    With one per core, a third of the processor time is lost to tests that wait for processes, disks and time limits;
    each further process takes 20 s of processor time for its imports.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return min(len(os.sched_getaffinity(0)) + 1, 8) if whole and not config.option.collectonly else 0


def pytest_configure(config: pytest.Config) -> None:
    """Keep the files of the whole suite in memory, where that has room: tests flush thousands of files to the disk.

    TMPDIR and `--basetemp` override it. The files are deleted at the end.
    """
    whole = bool(config.option.numprocesses) and "PYTEST_XDIST_WORKER" not in os.environ
    if not whole or config.option.basetemp or "TMPDIR" in os.environ or not MEMORY.is_dir():
        return
    if shutil.disk_usage(MEMORY).free > MEMORY_NEEDED and _available_memory() > MEMORY_NEEDED + PROCESSES_NEED:
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="vaflow-", dir=MEMORY)  # pytest has read it
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("TMPDIR"), ignore_errors=True))


def _available_memory() -> int:
    """Bytes that processes may still use, from /proc."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Do not search for garbage among the modules that are imported here, neither now (4 s) nor later."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files of `SLOWEST` to the front, and those of this folder, most of which are short, to the end."""
    rank = {name: place for place, name in enumerate(SLOWEST)}
    last = len(rank) + 1
    items.sort(key=lambda item: rank.get(item.path.name, last if item.path.parent == HERE else last - 1))


@pytest.fixture(scope="session", autouse=True)
def workers_fork_from_a_server() -> None:
    """Start the package's worker processes from one that has imported what they need.

    A spawned worker imports for 0.3 s, or 2.5 s with torch. Scripts and commands of the fixture `lab` still spawn.
    """
    imported = ["vaflow.extract.worker", "vaflow.train.train_run", "torch._dynamo", "torch._inductor.config", "cv2"]
    multiprocessing.set_forkserver_preload(imported)
    vaflow.process.START_METHOD = "forkserver"  # type: ignore[assignment]


@pytest.fixture(scope="module", autouse=True)
def blank_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write one pixel for each figure, except in tests of figures: drawing takes nearly all of a small run's time."""
    if request.path.name in DRAWING or "torch" not in sys.modules:
        yield
        return
    from blank_figures import FIGURES, plot_blank

    from vaflow.train import plots

    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(plots, name, plot_blank)
        yield


@pytest.fixture(autouse=True)
def default_log_level() -> Iterator[None]:
    """Undo the log level that a command has set, in this process or in a fixture: `caplog` depends on it."""
    logger = logging.getLogger("vaflow")
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(logging.NOTSET)


HERE = Path(__file__).parent
ROOT = HERE.parent
CLIPS_VARIABLE = "VAFLOW_TEST_CLIPS"


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips: VAFLOW_TEST_CLIPS, by default `clips` in the repository; tests skip without it."""
    folder = os.environ.get(CLIPS_VARIABLE)
    path = Path(folder or ROOT / "clips").resolve()  # commands are run in other folders, too
    if not (path / "obama.mp4").is_file():
        if folder:
            pytest.fail(f"{CLIPS_VARIABLE}={folder} holds no clips: run `python scripts/fetch_clips.py {folder}`")
        pytest.skip("no clips: run `python scripts/fetch_clips.py clips`")
    return path


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Lab]":
    """A process that has imported everything and forks commands: real processes without the time of imports."""
    from lab import lab_in

    with lab_in(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
