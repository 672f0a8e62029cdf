"""Processes: the environment of this one, heartbeats of slow work, child processes of the pools, and Ray.

A child process ignores the signals that a terminal or a scheduler sends to the whole group (the parent handles them)
and exits when its parent dies, however that happens.
"""

import getpass
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Literal

from vaflow.errors import UsageError, explain

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # sent to children, too, by a terminal or a scheduler
START_METHOD: Literal["spawn"] = "spawn"  # fork would copy the locks of torch's and FFmpeg's threads
BEAT_SECONDS = 1.0  # least time between two heartbeats that are passed on

_UNGUARDED = 97  # exit code of a child process that ran the user's script again

_listeners: list[Callable[[], None]] = []
_last_beat = [0.0]


def beat() -> None:
    """Report progress from inside a long loop (packets, frames, file blocks), so that slow work is not taken for hung.

    Without a listener this does nothing.
    """
    if _listeners and (now := time.monotonic()) - _last_beat[0] >= BEAT_SECONDS:
        _last_beat[0] = now
        _listeners[-1]()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` for the heartbeats inside, at most once every `BEAT_SECONDS`."""
    _listeners.append(listener)
    _last_beat[0] = time.monotonic()
    try:
        yield
    finally:
        _listeners.remove(listener)


class ChildProcess:
    """A spawned process and this side of the pipe to it.

    Args:
        target: called in the child as `target(pipe, *arguments)`; importable by name.
        arguments: are pickled.
        name: of the process, as tools list it.
    """

    def __init__(self, target: Callable[..., None], arguments: Sequence[Any] = (), *, name: str) -> None:
        exit_if_script_runs_again()
        context = multiprocessing.get_context(START_METHOD)
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_run_child, args=(target, other, *arguments), name=name, daemon=True)
        try:
            with _signals_deferred():
                self._process.start()
        except BaseException:
            if self._process.pid is not None:
                self._process.kill()
            self.pipe.close()
            raise
        finally:
            other.close()

    def kill(self) -> None:
        """End the process at once and wait for its end. The pipe stays open."""
        if self._process.is_alive():
            self._process.kill()  # it ignores the gentler signals and holds nothing to tidy up
        self._process.join()

    def join(self) -> None:
        """Wait until the process has ended."""
        self._process.join()

    @property
    def ran_script_again(self) -> bool:
        """Whether the process ended because the user's script has no `if __name__ == "__main__":`."""
        return self._process.exitcode == _UNGUARDED

    @property
    def ending(self) -> str:
        """How the process ended: "signal SIGKILL", "exit code 1"."""
        code = self._process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def exit_if_script_runs_again() -> None:
    """End this process if it is a child that imports the user's script, and so got here a second time.

    A spawned process imports the main script. Without `if __name__ == "__main__":` that starts the work again, which
    Python ends with a traceback about `freeze_support`; the parent explains it instead.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_UNGUARDED)


def _run_child(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    target(pipe, *arguments)


def _exit_with_parent() -> None:
    """Exit when the parent dies: an orphan would go on decoding, or write into the folder of the next run."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Handle `GROUP_SIGNALS` after the block; a process that is started inside inherits them blocked.

    A process whose start is interrupted half-way prints a traceback of its own.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only there Python runs and changes handlers

        def note(number: int, _: FrameType | None) -> None:
            received.append(number)

        handlers = {number: signal.signal(number, note) for number in GROUP_SIGNALS}
    resource_tracker.ensure_running()  # starting it inside `Process.start` would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def prepare_environment() -> None:
    """Set up what libraries expect of a process; call before torch is imported. Child processes inherit it.

    - Closed standard streams are opened on the null device: output is dropped, and no data file gets their numbers.
    - A user id without a passwd entry (`docker run --user 54321`) gets a name: torch refuses to start without one.
    - OpenMP threads sleep while they wait: spinning ones slowed our decoders down 20 times.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            os.dup2(handle, number)
            if handle != number:
                os.close(handle)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


ENGINES = ("local", "ray")
# Ray's ports execute code for anyone who can reach them. Ray binds them to 127.0.0.1 where it has no cluster support.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# No banner, no usage report, no log lines of the cluster on standard output. Variables that the user has set are kept.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def check_engine(engine: str, ray_address: str | None) -> None:
    """Raise UsageError unless --engine exists and --ray-address fits it."""
    if engine not in ENGINES:
        raise UsageError(explain("Unknown --engine", got=engine, choices=ENGINES))
    if ray_address is not None and engine != "ray":
        raise UsageError(explain("--ray-address requires --engine ray", got=f"--engine {engine}"))


def starts_here(address: str | None) -> bool:
    """Whether Ray is started on this machine, for this command only, instead of joining a cluster."""
    return address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))


def import_ray(*, loopback: bool = False) -> Any:
    """The package, with its messages turned off.

    Args:
        loopback: have a Ray that is started here listen on this machine only.

    Raises:
        UsageError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if loopback:
        os.environ[LOOPBACK] = "0"
    try:
        import ray
        from ray._private import ray_constants
    except ImportError as error:
        raise UsageError(
            explain("Ray is not installed", got=error, remedy="Install it in the clone: pip install -e '.[ray]'")
        ) from error
    ray_constants.ENABLE_RAY_CLUSTER = not loopback and ray_constants.ENABLE_RAY_CLUSTER  # if it was imported before
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to Ray for the duration of a block. A Ray that the caller has started is used and left running.

    Raises:
        UsageError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},  # as `vaflow.cli` does for this process
    }
    if starts_here(address):
        address = "local"
        settings["include_dashboard"] = False
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        remedy = "Start a cluster with `ray start --head` and join it with --ray-address HOST:PORT, or use local"
        raise UsageError(explain(f"Cannot reach Ray at {where}", got=error, remedy=remedy)) from error
    if ours:
        signal.signal(signal.SIGTERM, before)  # Ray has put its own there
    try:
        yield
    finally:
        ray.shutdown()


class Notes(logging.Handler):
    """Collects log lines of an actor for the driver's log."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self._lines.put(record.getMessage())

    def collect(self) -> tuple[str, ...]:
        """The lines since the last call."""
        return tuple(self._lines.get() for _ in range(self._lines.qsize()))
