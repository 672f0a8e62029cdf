"""What every engine on Ray shares: the import, the connection to a cluster, and the log lines of its actors."""

import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vaflow.errors import UsageError, explain

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
