"""The commands of docs/viewer.md run unchanged."""

import re
import shlex
from pathlib import Path

import pytest
from toy_runs import write_run

from vaflow.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "viewer.md"


def test_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vaflow.viewer.page.ViewerServer.serve_forever", lambda _: None)
    for seed, name in enumerate(("full", "visual")):
        write_run(tmp_path / "runs" / name, seed=seed)
    (tmp_path / "affwild2" / "raw_videos").mkdir(parents=True)
    for name in ("ann", "bob"):
        (tmp_path / "ratings" / name).mkdir(parents=True)
        rows = [f"{k / 5},{(k % 7) / 7},{(k % 5) / 5}" for k in range(100)]
        (tmp_path / "ratings" / name / "clip.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert len(lines) >= 5
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert all((tmp_path / name).is_file() for name in ("view/index.html", "report.html", "labels/clip.csv"))
