"""Commands in restricted environments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = ["--visual", "clip-tiny", "--audio", "none", "--faces", "none", "--device", "cpu", "--workers", "1"]
SMALL = ["--epochs", "1", "--set", "hidden=8", "--set", "val_split=train", "--audio", "none", "--device", "cpu"]

# torch asks the passwd database for the user's name, which fails in a container started with `--user 54321`.
WITHOUT_PASSWD_ENTRY = """
import pwd, sys
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from vaflow.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cache(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("environment") / "cache"
    subprocess.run([sys.executable, "-m", "vaflow", "extract", str(data), "--out", str(out), *TINY], check=True)
    return out


def test_a_user_without_a_passwd_entry_extracts_and_trains(data: Path, tmp_path: Path) -> None:
    names = ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in names} | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    for args in (["extract", data, "--out", "cache", *TINY], ["train", "cache", "--out", "run", *SMALL]):
        command = [sys.executable, "-c", WITHOUT_PASSWD_ENTRY, *map(str, args)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run", "tmp"]


@pytest.mark.parametrize("command", ["check", "extract", "train", "info", "missing"])
def test_commands_run_with_closed_standard_streams(data: Path, cache: Path, tmp_path: Path, command: str) -> None:
    args, code = {
        "check": (["check", data], 0),
        "extract": (["extract", data, "--out", tmp_path / "cache", *TINY], 0),
        "train": (["train", cache, "--out", tmp_path / "run", *SMALL], 0),
        "info": (["cache", "info", cache], 0),
        "missing": (["cache", "info", tmp_path / "missing"], 2),
    }[command]
    for closed in ("2>&-", "<&- >&- 2>&-"):
        line = " ".join([sys.executable, "-m", "vaflow", *map(str, args), closed])
        assert subprocess.run(line, shell=True, check=False, timeout=300).returncode == code, line


def test_a_missing_device_is_a_usage_error_in_every_command(data: Path, cache: Path, tmp_path: Path) -> None:
    for args in (
        ["extract", str(data), "--out", str(tmp_path / "new"), *TINY[:-4], "--device", "cuda:99"],
        ["train", str(cache), "--out", str(tmp_path / "run"), *SMALL[:-2], "--device", "cuda:99"],
    ):
        command = [sys.executable, "-m", "vaflow", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "no such GPU" in done.stderr
