"""`scripts/label_costs.py` on generated labels equals the formula and the generating values."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "label_costs.py"
RATE, ROWS, VIDEOS = 10, 600, 12


def concordance(x: np.ndarray, y: np.ndarray) -> float:
    return float(2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """Slow curves around a level of each video; the last video begins with rows that are not annotated."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(1)
    videos = []
    for k in range(VIDEOS):
        phase = np.linspace(0, 20, ROWS)[:, None] + rng.uniform(0, 6, 2)
        value = np.round(np.clip(rng.normal(0, 0.3, 2) + 0.3 * np.sin(phase), -1, 1), 4)
        if k == VIDEOS - 1:
            value[:100] = -5
        rows = "\n".join(f"{v:g},{a:g}" for v, a in value)
        (folder / f"video{k:02}.txt").write_text(f"valence,arousal\n{rows}\n")
        videos.append(np.where(value == -5, np.nan, value))
    return folder, videos


def test_estimated_label_costs_equal_the_formula(labels: tuple[Path, list[np.ndarray]]) -> None:
    folder, videos = labels
    command = [sys.executable, str(SCRIPT), str(folder), "--rate", str(RATE), "--draws", "50", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (report["videos"], report["rows"]) == (VIDEOS, VIDEOS * ROWS)
    figures = report["ccc"]
    for k in range(2):
        for seconds in (0.5, 1.0):
            rows = round(seconds * RATE)
            pairs = np.concatenate([np.stack([video[:-rows, k], video[rows:, k]], axis=1) for video in videos])
            pairs = pairs[np.isfinite(pairs).all(axis=1)]
            assert figures[f"perfect, {seconds:g} s late"][k] == pytest.approx(concordance(*pairs.T))
        known = [video[np.isfinite(video[:, k]), k] for video in videos]
        constant = np.concatenate([np.full(len(values), values.mean()) for values in known])
        assert figures["mean of each video"][k] == pytest.approx(concordance(constant, np.concatenate(known)))
        predictor = figures["synthetic predictor"][k]
        assert predictor == pytest.approx((0.586, 0.447)[k], abs=1e-6)
        assert figures["synthetic predictor, -5 kept as a target"][k] < predictor - 0.1
    assert 0 < figures["standard deviation over resampled videos"][0] < 0.3


def test_an_unlabelled_dataset_is_rejected(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "no label file" in done.stderr
