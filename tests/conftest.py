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
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

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

# Folders whose tests run commands in processes that the fixture `lab` forks, and such files of other folders.
FORKING = ("faults", "finetune", "attacks")
FORKING_FILES = (
    "test_ray_cluster.py",
    "test_cli_environment.py",
    "test_cli_file_names.py",
    "test_ray_team.py",
    "test_nvdec.py",
)
COMMANDS = "commands"
LONGEST = "test_ray_cluster.py"

# Parts of the suite, those that take longest first: a process that starts one of them last would finish alone.
PARTS = (
    COMMANDS,
    "extract",
    "train",
    "viewer",
    "encoders",
    "tests",
    "cli",
    "cache",
    "faces",
    "demo",
    "fuzz",
    "datasets",
)


def part_of(path: Path) -> str:
    """The part of the suite that a test file belongs to: its folder, or `COMMANDS`."""
    return COMMANDS if path.parent.name in FORKING or path.name in FORKING_FILES else path.parent.name


class OneProcessPerPart(LoadScopeScheduling):
    """Run each part in one process, so that what its tests share (caches, clips, a browser, imports) is made once."""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(Path(nodeid.partition("::")[0]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessPerPart:
    """Replace the scheduler of xdist."""
    return OneProcessPerPart(config, log)


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
    """Search for garbage less often, and never among the modules that are imported here, now (4 s) or later."""
    gc.disable()
    yield
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)  # by default it takes a thirtieth of the tests' time
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by part, the longest part first, and in it the longest file."""
    rank = {part: place for place, part in enumerate(PARTS)}
    items.sort(key=lambda item: (rank.get(part_of(item.path), len(rank)), item.path.name != LONGEST))


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
    _unset_log_level()
    yield
    _unset_log_level()


def _unset_log_level() -> None:
    logger = logging.getLogger("vaflow")
    if logger.level != logging.NOTSET:  # setting it empties the caches of all loggers: a second in the whole suite
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
