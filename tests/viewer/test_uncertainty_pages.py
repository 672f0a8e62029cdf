"""Intervals, far frames and interpolated frames on the pages and pictures, and the mark of demonstrations."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from toy_runs import write_run

from vaflow.cli import main
from vaflow.encoders import demonstration_notice
from vaflow.train import plots
from vaflow.train.traces import Trace
from vaflow.train.windows import ClipRows
from vaflow.viewer import Predictions, read_predictions
from vaflow.viewer.clip_data import masks_of, payload, scores_of
from vaflow.viewer.page import write_viewer
from vaflow.viewer.report import band, write_report
from vaflow.viewer.run_results import read_run
from vaflow.viewer.video import BAND, write_overlay

COVERAGE: dict[str, dict[str, float | None]] = {
    "valence": {"50": 0.512, "80": 0.834, "95": 0.961},
    "arousal": {"50": 0.489, "80": None, "95": 0.913},
}


def uncertain_run(path: Path) -> Path:
    """A run on disk with standard deviations of .25 and .5, every fifth frame a sample, the first second far."""
    metrics = write_run(path)
    each = {"valence": 0.25, "arousal": 0.5}
    metrics |= {
        "coverage": COVERAGE,
        "uncertainty": {
            "calibrated_on": "val", "held_out": "each video is calibrated on the others",
            "mean_std": each, "nll": each, "nll_constant": each,
        },
    }  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(metrics))
    for file in (path / "predictions/val").glob("*.csv"):
        head, *rows = file.read_text().splitlines()
        rows = [f"{row},0.25,0.5,{int(k < 10)},{int(k % 5 > 0)}" for k, row in enumerate(rows)]
        file.write_text("\n".join([f"{head},valence_std,arousal_std,far_from_training,interpolated", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uncertain_run(tmp_path_factory.mktemp("uncertain") / "run")


def test_uncertainty_columns_are_read(run: Path) -> None:
    table = read_predictions(run / "predictions/val/clip0.csv")
    assert table.std is not None and table.far is not None and table.interpolated is not None
    np.testing.assert_array_equal(table.std, np.tile([0.25, 0.5], (200, 1)))
    assert table.far.sum() == 10 and table.interpolated.sum() == 160
    document = payload(table, masks_of(table, None, "clip0", ()), None)
    assert document["far"] == [[0.0, 1.0]] and "interpolated" in document
    scores = scores_of(table, masks_of(table, None, "clip0", ()))
    assert scores.far == pytest.approx(0.05) and scores.std == (0.25, 0.5)


def test_the_report_shows_the_stored_coverage(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for level in ("50", "80", "95"):
        (row,) = re.findall(rf'<tr data-level="{level}">(.*?)</tr>', page)
        shown = [float(x) if x else None for x in re.findall(r'data-value="([^"]*)"', row)]
        assert shown == [COVERAGE[name][level] for name in COVERAGE]
    assert "each video is calibrated on the others" in page
    assert page.count('class="band"') == 12, "two dimensions of three best and three worst clips"
    assert page.count('<td data-value="0.05">5.0 %</td>') == 6, "far frames of every clip"


def test_standard_deviations_are_drawn_as_a_band(run: Path) -> None:
    clip = read_run(run).clips[0]
    numbers = np.array(re.findall(r"[\d.]+", band(clip, 1)), float).reshape(-1, 2)
    half = len(numbers) // 2
    expected = np.clip(clip.traces[1] + 1.96 * 0.5, -1, 1)
    np.testing.assert_allclose((25 - numbers[:half, 1]) / 24, expected, atol=0.003)
    assert band(replace(clip, std=None), 0) == ""


def test_the_viewer_draws_bands_and_far_frames(run: Path, tmp_path: Path, open_page: Any) -> None:
    write_viewer(run, tmp_path / "view")
    page = open_page(tmp_path / "view/index.html")
    page.wait_for_selector("html[data-ready]")
    assert "Interpolated" not in page.inner_text("#readout")
    page.keyboard.press(".")
    page.wait_for_function("document.documentElement.dataset.row === '1'")
    assert "Interpolated between samples." in page.inner_text("#readout")
    assert "± 0.25" in page.inner_text("#readout") and "± 0.50" in page.inner_text("#readout")
    assert "far from those of the training split" in page.inner_text("#lanes")
    assert "5.0% of the frames" in page.inner_text("#notes")
    with_far = page.evaluate("document.querySelector('[data-strip=masks]').clientHeight")
    write_run(tmp_path / "plain")
    write_viewer(tmp_path / "plain", tmp_path / "plain view")
    plain = open_page(tmp_path / "plain view/index.html")
    plain.wait_for_selector("html[data-ready]")
    assert plain.evaluate("document.querySelector('[data-strip=masks]').clientHeight") < with_far
    assert "far from" not in plain.inner_text("#lanes")


def test_overlays_have_the_band(numbered: Path, tmp_path: Path) -> None:
    time = np.arange(300) / 25
    table = Predictions(time, np.zeros((300, 2)), std=np.full((300, 2), 0.3), far=time < 2)
    write_overlay(numbered / "media/constant.mp4", table, tmp_path / "overlay.mp4")
    with av.open(str(tmp_path / "overlay.mp4")) as opened:
        frame = next(opened.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert (np.abs(frame - BAND).max(axis=-1) < 25).mean() > 0.05


@pytest.mark.parametrize("noted", [False, True])
def test_figures_have_the_band_and_the_note(noted: bool, tmp_path: Path) -> None:
    time = np.arange(100) / 10
    clip = ClipRows("a", "a", 10.0, time, np.zeros((100, 2)), np.ones((100, 2), bool), 0, 1)
    trace = Trace(clip, np.zeros((100, 2)), None, std=np.full((100, 2), 0.4), far=time < 3)
    sizes = []
    for name, one in (("with", trace), ("without", replace(trace, std=None, far=None))):
        plots.plot_trace(tmp_path / f"{name}.png", one, demonstration_notice(["clip-tiny"]) if noted else "")
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        sizes.append(int(((image - image.mean(axis=-1, keepdims=True)).max(axis=-1) > 8).sum()))
        note = np.abs(image - (0xB3, 0x47, 0x00)).max(axis=-1) < 40
        assert (note[-25:, :400].sum() > 50) == noted
    assert sizes[0] > sizes[1] + 10_000


def test_only_tiny_encoders_mark_a_demonstration() -> None:
    assert demonstration_notice(["clip-vit-b16", "ast"]) == ""
    notice = demonstration_notice(["clip-tiny", "ast", "clip-tiny"])
    assert notice == "Demonstration: encoders with seeded random weights (clip-tiny)"


def test_the_clip_summary_contains_standard_deviations(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "tables"), "--format", "csv"]) == 0
    values = next(csv.DictReader((tmp_path / "tables/clips.csv").open()))
    assert float(values["valence_predicted_std"]) == 0.25 and float(values["far_from_training_share"]) == 0.05
