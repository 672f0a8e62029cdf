"""Extraction called from a user's own script."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import write_video

BODY = """
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
{guard}extract(open_dataset({root!r}), {out!r}, ExtractConfig(visual=(), audio=(), device="cpu"))
"""


def run_script(tmp_path: Path, guard: str) -> "subprocess.CompletedProcess[str]":
    write_video(tmp_path / "data" / "a.mp4", np.arange(10) / 25, audio_seconds=0.0)
    script = tmp_path / "script.py"
    script.write_text(BODY.format(guard=guard, root=str(tmp_path / "data"), out=str(tmp_path / "cache")))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)


def test_a_script_without_a_main_guard_gets_an_error_with_a_remedy(tmp_path: Path) -> None:
    done = run_script(tmp_path, "")
    assert done.returncode != 0
    assert '`if __name__ == "__main__":`' in done.stderr
    assert "bootstrapping" not in done.stderr
    assert done.stderr.count("Traceback") == 1, "the output must come from the script process only"


@pytest.mark.slow  # like a command
def test_a_script_with_a_main_guard_accepts_string_paths(tmp_path: Path) -> None:
    done = run_script(tmp_path, 'if __name__ == "__main__": ')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "records" / "labels" / "a.json").is_file()
