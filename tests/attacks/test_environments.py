"""Commands in environments that break assumptions succeed or fail with a message, never a traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from media import write_media

from vaflow.cli import main

TINY = ["--visual", "none", "--device", "cpu", "--workers", "1"]
SHORT = ["--window", "2", "--stride", "1", "--frames", "4", "--audio-steps", "4"]
SMALL = ["--kl-weight", "0", "--set", "hidden=8", "--epochs", "1", "--device", "cpu"]
SEVERAL = Path(__file__).with_name("several_commands.py")
AS_ROOT = os.geteuid() == 0


@dataclass(frozen=True)
class Environment:
    """How a command is started.

    Attributes:
        prefix: what runs it.
        variables: set in its environment; None removes one.
        script: shell text in the place of `"$@"`.
        needs_root: it cannot be made by other users.
        codes: exit codes that are an answer here, besides 0.
    """

    prefix: Sequence[str] = ()
    variables: Mapping[str, str | None] = field(default_factory=dict)
    script: str = '"$@"'
    needs_root: bool = False
    codes: tuple[int, ...] = ()


C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# ROOT may lie in /dev/shm: it stays visible there.
SMALL_SHM = (
    'mount --bind "$ROOT" /mnt; mount -t tmpfs -o size=64k tmpfs /dev/shm; '
    'mkdir -p "$ROOT"; mount --bind /mnt "$ROOT"; "$@"'
)
CONTAINER, NO_HOME = "no passwd entry, no HOME, tiny shared memory, C locale", "HOME that is not there, C locale"
HANDLES = "few file handles"
# Conditions that do not hide each other share an environment: a command imports torch in every one.
ENVIRONMENTS = {
    CONTAINER: Environment(  # as in one that runs with --user 54321
        ["unshare", "--mount"],
        variables={**dict.fromkeys(["USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CACHE_HOME"]), **C_LOCALE},
        script="ulimit -n 128; mount --bind /dev/null /etc/passwd; " + SMALL_SHM,
        needs_root=True,
    ),
    NO_HOME: Environment(variables={"HOME": "/nonexistent", "XDG_CACHE_HOME": None, **C_LOCALE}),
    HANDLES: Environment(script='ulimit -n 128; "$@"', codes=(1,)),
    "little memory": Environment(script='ulimit -v 3000000; "$@"', codes=(1,)),
    "optimised twice": Environment(variables={"PYTHONOPTIMIZE": "2"}, codes=(2,)),
    "read-only everything": Environment(
        ["unshare", "--mount"],
        script='mount --bind "$ROOT" "$ROOT"; mount -o remount,ro,bind "$ROOT"; "$@"',
        needs_root=True,
        codes=(1, 2),
    ),
}

BOTH = "extract and train"
# Commands that run one after the other in one process.
COMMANDS: dict[str, Callable[[Path], list[list[object]]]] = {
    "check": lambda root: [["check", root / "data"]],
    BOTH: lambda root: [
        ["extract", root / "data", "--out", root / "cache2", "--audio", "vggish-tiny", *TINY, *SHORT],
        ["train", root / "cache", "--out", root / "run2", *SMALL],
    ],
    "info": lambda root: [["cache", "info", root / "cache"]],
    "verify": lambda root: [["cache", "verify", root / "cache"]],
    "evaluate": lambda root: [["evaluate", root / "run", "--device", "cpu"]],
    "predict": lambda root: [["predict", root / "run", root / "data" / "clip0.mp4", "--out", root / "predictions"]],
}
# In each environment: extraction and training, which import torch, start worker processes, and write a cache and a run;
# and a light command. The rest is slow.
QUICK = {(name, command) for name in ENVIRONMENTS for command in (BOTH, "info")}
if AS_ROOT:  # the first environment is as hard
    QUICK -= {(NO_HOME, BOTH), (HANDLES, BOTH)}
CASES = [
    pytest.param(name, command, id=f"{name}-{command}", marks=() if (name, command) in QUICK else pytest.mark.slow)
    for name in ENVIRONMENTS
    for command in COMMANDS
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a cache and a run."""
    root = tmp_path_factory.mktemp("environments")
    write_media(root / "data", 3)
    for args in (
        ["extract", root / "data", "--out", root / "cache", "--audio", "vggish-tiny", *TINY, *SHORT],
        ["train", root / "cache", "--out", root / "run", *SMALL],
    ):
        assert main(list(map(str, args))) == 0
    return root


def start(
    environment: Environment, commands: Sequence[Sequence[object]], root: Path
) -> subprocess.CompletedProcess[str]:
    """Run the commands in an environment, in one process."""
    variables = {**os.environ, "ROOT": str(root), "OMP_NUM_THREADS": "1", **environment.variables}
    words = [json.dumps(list(map(str, args))) for args in commands]
    return subprocess.run(
        [*environment.prefix, "sh", "-c", environment.script, "sh", sys.executable, str(SEVERAL), *words],
        env={name: value for name, value in variables.items() if value is not None},
        cwd="/",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("name", "command"), CASES)
def test_commands_succeed_or_report_an_error(workplace: Path, name: str, command: str) -> None:
    environment = ENVIRONMENTS[name]
    if environment.needs_root and not AS_ROOT:
        pytest.skip("only root can make this environment")
    if environment.prefix and shutil.which(environment.prefix[0]) is None:
        pytest.skip(f"{environment.prefix[0]} is not installed")
    for made in ("cache2", "run2", "predictions"):
        shutil.rmtree(workplace / made, ignore_errors=True)
    commands = COMMANDS[command](workplace)
    ended = start(environment, commands, workplace)
    printed = ended.stdout + ended.stderr
    assert "Traceback" not in printed, printed[-3000:]
    assert "Exception ignored" not in printed, printed[-3000:]
    assert ended.returncode == 0, printed[-3000:]
    codes = json.loads(ended.stdout.rpartition("exit codes ")[2])
    assert len(codes) == len(commands)
    assert set(codes) <= {0, *environment.codes}, printed[-3000:]
    assert printed.count("vaflow: ") >= len([code for code in codes if code]), printed[-3000:]
