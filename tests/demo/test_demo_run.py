"""The demo command end to end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.demo import DemoResult, describe

ROOT = Path(__file__).parents[2]
FIGURES = {"agreement.png", "training.png", "trace-val01.png"}


@pytest.fixture(scope="module", params=[6, pytest.param(24, marks=pytest.mark.slow)])  # 24: the default
def clip_count(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def demo(clip_count: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), "--clips", str(clip_count), "--quiet"]) == 0
    return out


def test_the_demo_scores_held_out_people(demo: Path, clip_count: int) -> None:
    """The stored score reaches the documented one and equals a score computed from the files."""
    metrics = json.loads((demo / "run" / "metrics.json").read_text())
    assert metrics["n_clips"] == clip_count // 3
    ccc = metrics["ccc"]
    assert ccc["mean"] >= 0.5
    predicted, labelled = [], []
    for path in sorted((demo / "run" / "predictions" / "val").glob("*.csv")):
        rows = list(csv.DictReader(path.open()))
        annotation = demo / "data" / "VA_Estimation_Challenge" / "Validation_Set" / f"{path.stem}.txt"
        labels = [tuple(map(float, line.split(","))) for line in annotation.read_text().splitlines()[1:]]
        for row, label in zip(rows, labels, strict=False):
            if min(label) >= -1:  # -5: not annotated
                predicted.append((float(row["valence"]), float(row["arousal"])))
                labelled.append(label)
    x, y = np.array(predicted), np.array(labelled)
    covariance = ((x - x.mean(axis=0)) * (y - y.mean(axis=0))).mean(axis=0)
    oracle = 2 * covariance / (x.var(axis=0) + y.var(axis=0) + (x.mean(axis=0) - y.mean(axis=0)) ** 2)
    assert oracle.tolist() == pytest.approx([ccc["valence"], ccc["arousal"]], abs=1e-5)


def test_intervals_have_nominal_coverage_on_held_out_people(demo: Path) -> None:
    """With two (by default eight) held-out people; docs/uncertainty.md has the coverage on sixty."""
    metrics = json.loads((demo / "run" / "metrics.json").read_text())
    for levels in metrics["coverage"].values():
        assert all(share == pytest.approx(int(level) / 100, abs=0.1) for level, share in levels.items())


def test_the_people_of_the_two_splits_differ(demo: Path) -> None:
    cache = open_cache(demo / "cache")
    assert cache.items(split="train")
    assert cache.items(split="val")
    assert not set(cache.items(split="train")) & set(cache.items(split="val"))


def test_the_demo_writes_figures(demo: Path) -> None:
    drawn = {path.name for path in (demo / "run" / "pictures").glob("*.png")}
    assert drawn >= FIGURES
    for name in FIGURES:
        assert (demo / "run" / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_demo_in_one_folder_reuses_every_stage(
    demo: Path, clip_count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*(demo / "data").rglob("*.mp4"), *(demo / "cache" / "records").rglob("*.json"), demo / "run/history.csv"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert main(["demo", "--out", str(demo), "--clips", str(clip_count), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ccc"]["mean"] >= 0.5
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.slow
def test_demo_controls_score_near_zero_over_three_seeds(tmp_path: Path) -> None:
    """Both modalities beat each alone; shuffled labels score zero; noise removes a modality's gain."""
    script = [sys.executable, str(ROOT / "scripts" / "demo_honesty.py"), "--seeds", "3", "--out", str(tmp_path)]
    assert subprocess.run(script, check=False).returncode == 0


def test_one_held_out_clip_is_described_without_intervals(tmp_path: Path) -> None:
    names = ("valence", "arousal", "mean")
    metrics = {
        "ccc": dict.fromkeys(names, 0.5),
        "ci95": {name: [None, None] for name in names},
        "coverage": {"valence": {"50": None}, "arousal": {"50": None}},
        "uncertainty": {"held_out": "each video is calibrated on the others"},
    }
    text = describe(DemoResult(tmp_path, metrics))
    assert "valence  0.500  no interval" in text and "Labels inside" not in text
