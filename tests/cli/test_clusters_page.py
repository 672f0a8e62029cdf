"""The commands of docs/clusters.md run as written; the array command runs once per SLURM task.

Tiny encoders stand in for those with weights to download, a store in memory for the bucket.
"""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from affwild2_tree import build_affwild2

from vaflow.cache import open_cache
from vaflow.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
STAND_INS = {"clip-vit-b16": "clip-tiny", "ast": "vggish-tiny"}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data set that the page names."""
    build_affwild2(tmp_path / "affwild2", seconds=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAFLOW_CACHE_DIR", str(tmp_path / "local"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def section(title: str) -> list[str]:
    """The runnable code blocks of one section."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def execute(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run every line as a shell does; return the last output."""
    for line in block.splitlines():
        if not line.startswith("#"):
            words = shlex.split(os.path.expandvars(line.removeprefix("srun ").replace("s3://", "memory://")))
            assert words[0] == "vaflow", line
            code = main([STAND_INS.get(word, word) for word in words[1:]])
            printed = capsys.readouterr()
            assert code == 0, f"{line}\n{printed.err}"
    return printed.out


def tasks_of(script: str) -> range:
    """Numbers that `#SBATCH --array=A-B` starts."""
    first, last = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script, flags=re.MULTILINE)[0]
    return range(int(first), int(last) + 1)


def test_slurm(sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script, afterwards = section("SLURM")
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    tasks = tasks_of(script)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(len(tasks)))
    for number in reversed(tasks):  # in any order
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        execute(script, capsys)
        failures = sandbox / "affwild2.cache" / f"failures-{number}-of-{len(tasks)}.jsonl"
        assert not failures.exists()  # a list is written only where something failed
    printed = execute(afterwards.splitlines()[0] + " --json", capsys)
    assert json.loads(printed)["items"] == 0
    execute(afterwards, capsys)
    (sandbox / "affwild2.cache").rename(sandbox / "by_slurm.cache")

    for block in section("Without a shared disk"):
        execute(block, capsys)
    assert open_cache(sandbox / "whole.cache").items() == open_cache(sandbox / "by_slurm.cache").items()


def test_object_stores(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    try:
        printed = "".join(execute(block, capsys) for block in section("Object stores"))
    finally:
        fsspec.filesystem("memory").store.clear()
    assert "vggish-tiny" in printed


def test_ray(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command is accepted; what it does on a cluster is tested in tests/test_ray_cluster.py."""
    [block] = section("Ray")
    assert execute(f"{block.rstrip()} --dry-run", capsys)


def test_every_documented_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?<=`)--[a-z-]+|--engine|--ray-address", PAGE))
    for command in (["extract", "--help-all"], ["ablate", "--help"], ["search", "--help"]):
        assert main(command) == 0
    help_text = capsys.readouterr().out
    assert {"--shard", "--engine", "--ray-address", "--image-batch"} <= named
    assert [option for option in named if option not in help_text] == []
