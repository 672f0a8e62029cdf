"""Trace the system calls of a command with strace; the command is not patched."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CALLS = "fsync,fdatasync,link,linkat,rename,renameat,renameat2,write,pwrite64,unlink,unlinkat"
_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += +(-?\d+)")
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += +(-?\d+)")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_HANDLE = re.compile(r"^\d+<([^>]*)>")


@dataclass(frozen=True)
class Call:
    """One successful system call: name, file (of links and renames: the new name), start and end."""

    name: str
    path: Path
    began: int
    ended: int


def trace(args: Sequence[object], log: Path) -> list[Call]:
    """Run `vaflow ARGS` in a new interpreter; skips where there is no strace."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    code = "import sys; from vaflow.cli import main; sys.exit(main(sys.argv[1:]))"
    traced = [program, "--seccomp-bpf", "-f", "-y", "-qq", "-s", "4096", "-o", str(log), "-e", f"trace={CALLS}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    strace = subprocess.run(
        [*traced, sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True
    )
    if "ptrace" in strace.stderr and "not permitted" in strace.stderr:
        pytest.skip(f"strace may not trace here: {strace.stderr.strip()}")
    assert strace.returncode == 0, strace.stderr
    return parse(log.read_text(errors="replace"))


def parse(text: str) -> list[Call]:
    """Calls that succeeded, in the order in which they ended."""
    begun: dict[str, tuple[str, str, int]] = {}
    calls = []
    for number, line in enumerate(text.splitlines()):
        if match := _BEGUN.fullmatch(line):
            begun[match[1]] = match[2], match[3], number
            continue
        if match := _RESUMED.fullmatch(line):
            name, arguments, began = begun.pop(match[1])
            arguments, result = arguments + match[3], int(match[4])
        elif match := _WHOLE.fullmatch(line):
            name, arguments, began, result = match[2], match[3], number, int(match[4])
        else:
            continue
        path = _path(arguments)
        if result >= 0 and path is not None:
            calls.append(Call(name, path, began, number))
    return calls


def _path(argument: str) -> Path | None:
    if handle := _HANDLE.match(argument):
        return Path(handle[1])
    names = _PATH.findall(argument)
    return Path(names[-1]) if names else None
