"""Figures are drawn for any input and show missing data. Their appearance is not tested."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaflow.train import plots
from vaflow.train.traces import Trace
from vaflow.train.windows import ClipRows


def trace(seconds: float, rate: float = 30.0):
    time = np.arange(0, seconds, 1 / rate)
    va = np.stack([np.sin(time), np.cos(time)], axis=1) * 0.8
    regions = np.random.default_rng(0).dirichlet(np.ones(9), len(time))
    return time, va, regions


def plot(path: Path, time, va, *, label=None, name: str = "a clip", note: str = "", **parts) -> None:
    """Plot a trace; `parts` are further attributes of it."""
    label = np.full_like(va, np.nan) if label is None else label
    clip = ClipRows(name, name, 1.0, time, label, np.isfinite(label))
    plots.plot_trace(path, Trace(clip, va, parts.pop("regions", None), **parts), note)


def test_a_complete_trace_is_plotted(tmp_path: Path) -> None:
    time, va, regions = trace(20)
    label = np.where(time[:, None] < 12, va * 0.5, np.nan)
    has_face = (time < 5) | (time > 8)
    with_all, plain = tmp_path / "all.png", tmp_path / "plain.png"
    plot(with_all, time, va, label=label, regions=regions, face=has_face, audio=has_face)
    plot(plain, time, va)
    one, other = Image.open(with_all), Image.open(plain)
    assert one.size[0] == other.size[0] and one.size[1] > other.size[1]  # the region strip is added below
    for colour in (plots.VALENCE, plots.AROUSAL):
        assert pixels(other, colour) > 500
    assert pixels(one, plots.LABEL) > 300 > pixels(other, plots.LABEL)  # antialiased letters also contain grey


def test_labels_between_rows_without_a_label_are_plotted(tmp_path: Path) -> None:
    time, va, _ = trace(6)
    label = np.where(np.arange(len(time))[:, None] % 5 == 1, -va, np.nan)
    grey = []
    for name, shown in (("plain", va * np.nan), ("labels", label)):
        plot(tmp_path / f"{name}.png", time, va, label=shown)
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)[60:]  # without the legend
        grey.append((np.abs(image - int(plots.LABEL[1:3], 16)).max(axis=-1) < 24).sum())
    assert grey[1] > grey[0] + 300


def pixels(image: Image.Image, colour: str) -> int:
    """Number of pixels with exactly that colour."""
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(image.convert("RGB")) == rgb).all(axis=-1).sum())


def test_gaps_are_shaded_until_the_next_valid_frame() -> None:
    time = np.arange(0, 10, 0.5)
    valid = np.ones(20, bool)
    valid[[0, 1, 7, 19]] = False
    np.testing.assert_allclose(plots.missing_spans(time, valid), [(0, 1), (3.5, 4), (9.5, 10)])
    assert plots.missing_spans(time[:0], valid[:0]) == []


@pytest.mark.parametrize(
    "name",
    ["$x_{", "caf\udce9", *(pytest.param(x, marks=pytest.mark.slow) for x in ("US$ 5% of A$", "n" * 250, "a\x1b[31m"))],
)
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    time, va, _ = trace(1)
    clip = ClipRows(name, name, 1.0, time, va, np.ones(va.shape, bool), 0, 1)
    files = plots.draw_run(tmp_path, [], [Trace(clip, va, None)])
    assert len(files) == 2 and all(Image.open(path).size[0] > 800 for path in files)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_very_short_clips_are_plotted(tmp_path: Path, rows: int) -> None:
    time, va, regions = (array[:rows] for array in trace(1))
    has_face = np.zeros(rows, bool)
    plot(tmp_path / "p.png", time, va, regions=regions, label=va * np.nan, face=has_face, audio=has_face)
    assert Image.open(tmp_path / "p.png").size[0] > 800


def test_a_clip_of_half_an_hour_is_plotted(tmp_path: Path) -> None:
    time, va, regions = trace(1800)
    plot(tmp_path / "p.png", time, va, regions=regions, label=va)
    assert (tmp_path / "p.png").stat().st_size < 2_000_000


def test_training_curves_and_agreement_are_plotted(tmp_path: Path) -> None:
    row = {"loss_total": 1.0, "loss_ccc": 0.9, "loss_kl": 0.0, "val_ccc_valence": float("nan"), "val_ccc_arousal": 0.3}
    history = [{"epoch": k, **row, "val_ccc_mean": mean} for k, mean in ((1, 0.2), (2, 0.3), (3, float("nan")))]
    plots.plot_training(tmp_path / "curves.png", history)
    plots.plot_training(tmp_path / "one.png", history[2:])
    _, va, _ = trace(20)
    valid = np.stack([np.zeros(len(va), bool), np.ones(len(va), bool)], axis=1)
    plots.plot_agreement(tmp_path / "agreement.png", va * 0.9, np.where(valid, va, np.nan), valid)
    for path in tmp_path.iterdir():
        assert Image.open(path).size[0] > 800


def test_names_in_any_script_are_drawn_without_warnings(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    time, va, _ = trace(1)
    plot(tmp_path / "p.png", time, va, name="\u4f8b\u3048\u3070 \U0001f600", note="\ud55c\uae00")
    assert not recwarn.list
