"""Figures of a run: traces with the region probabilities, training curves, predictions against labels.

matplotlib is imported when a figure is drawn, and its global state is not used.
"""

import warnings
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import visible
from vaflow.timeline import Bools, Floats, isolated_rows, median_interval
from vaflow.train.metrics import DIMENSIONS, concordance
from vaflow.train.traces import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALENCE, AROUSAL, MEAN, LABEL = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
COLORS = {"valence": VALENCE, "arousal": AROUSAL, "mean": MEAN}
NO_FACE, NO_AUDIO, FAR = "#F0C24B", "#7A5AA0", "#B0155A"
COLUMNS = 1200  # columns of the region strip; more exceed the figure's resolution
TRACES = 3  # clips drawn after training
TITLE = 90  # characters
FILE_NAME = 100  # bytes of a clip's name in a file name


def plot_trace(path: Path, trace: Trace, note: str = "") -> None:
    """Plot valence and arousal of one clip over time, its labels, and the probabilities of the nine regions.

    Frames without face or audio, and those far from the training features, are shaded; standard deviations are drawn
    as a band of 1.96 of them. `note` is small text below the plots.
    """
    time, va, std, regions = trace.clip.time, trace.va, trace.std, trace.regions
    label = np.where(trace.clip.valid, trace.clip.value, np.nan)
    tall = regions is not None
    figure = _figure(11.5, 6.6 if tall else 4.2)
    ratios = [1, 1, 1.35] if tall else [1, 1]
    axes = figure.subplots(len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    for k, name in enumerate(DIMENSIONS):
        axes[k].axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        if np.isfinite(label[:, k]).any():
            dots: dict[str, Any] = {"marker": ".", "markersize": 4, "markevery": isolated_rows(label[:, k])}
            axes[k].plot(time, label[:, k], color=LABEL, linewidth=1.6, label="label", zorder=2, **dots)
        axes[k].plot(time, va[:, k], color=COLORS[name], linewidth=1.7, label=f"predicted {name}", zorder=3)
        if std is not None:
            low, high = (va[:, k] + sign * 1.96 * std[:, k] for sign in (-1, 1))
            axes[k].fill_between(time, low, high, color=COLORS[name], alpha=0.18, linewidth=0, label="95 %", zorder=1.5)
        axes[k].set(ylim=(-1.05, 1.05), yticks=[-1, -0.5, 0, 0.5, 1])
        axes[k].set_ylabel(name, color=COLORS[name], fontweight="bold")
        _tidy(axes[k])
        near = None if trace.far is None else ~trace.far
        shaded = (
            (trace.face, NO_FACE, "no face", ""),
            (trace.audio, NO_AUDIO, "no audio", "///"),
            (near, FAR, "far", "..."),
        )
        for valid, color, missing, hatch in shaded:
            for begin, end in [] if valid is None else missing_spans(time, valid):
                face, alpha = ("none", 0.55) if hatch else (color, 0.32)
                style: dict[str, Any] = {"facecolor": face, "edgecolor": color, "alpha": alpha, "hatch": hatch}
                axes[k].axvspan(begin, end, **style, linewidth=0, label=missing, zorder=1)
    if regions is not None:
        _region_panel(figure, axes[-1], time, regions)
    axes[-1].set_xlabel("time (s)")
    edge = median_interval(time)
    axes[-1].set_xlim(float(time[0]) if len(time) else 0.0, float(time[-1]) + edge if len(time) else 1.0)
    _legend(figure, axes[:2])
    text = visible(trace.clip.item)
    text = text if len(text) <= TITLE else f"{text[: TITLE - 1]}\N{HORIZONTAL ELLIPSIS}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    _save(figure, path, note)


def missing_spans(time: Floats, valid: Bools) -> list[tuple[float, float]]:
    """Begin and end in seconds of every span of frames without input; a frame lasts until the next one."""
    ends = np.append(time[1:], time[-1:] + median_interval(time))
    edges = np.diff(np.concatenate([[False], ~valid, [False]]).astype(int))
    first, last = np.flatnonzero(edges > 0), np.flatnonzero(edges < 0) - 1
    return [(float(time[a]), float(ends[b])) for a, b in zip(first, last, strict=True)]


def _region_panel(figure: "Figure", axes: "Axes", time: Floats, regions: Floats) -> None:
    """Draw a strip per region: its probability over time."""
    if not len(time):
        return
    begin, end = float(time[0]), float(time[-1]) + median_interval(time)
    columns = min(COLUMNS, len(time))
    middle = begin + (np.arange(columns) + 0.5) * (end - begin) / columns
    resampled = np.stack([np.interp(middle, time, regions[:, k]) for k in range(9)])
    extent = (begin, end, -0.5, 8.5)
    style: dict[str, Any] = {"origin": "lower", "cmap": "magma_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    image = axes.imshow(resampled, aspect="auto", extent=extent, **style)
    axes.set_yticks(range(9), REGION_NAMES, fontsize=8)
    for edge in (2.5, 5.5):
        axes.axhline(edge, color="#888888", linewidth=0.8)
    axes.set_ylabel("region", fontweight="bold")
    axes.tick_params(length=0)
    inset = axes.inset_axes((1.008, 0.0, 0.012, 1.0))
    bar = figure.colorbar(image, cax=inset)
    bar.set_label("probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def plot_training(path: Path, history: Sequence[Mapping[str, float]], note: str = "") -> None:
    """Plot losses and validation CCC per epoch; the best epoch is marked.

    Args:
        history: rows as in `history.csv`.
    """
    figure = _figure(10.5, 3.8)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses = (
        ("total", MEAN, "total"),
        ("ccc", "#009E73", "1 \N{MINUS SIGN} CCC"),
        ("kl", "#CC79A7", "KL (unweighted)"),
    )
    for name, color, label in losses:
        values = [row.get(f"loss_{name}", 0.0) for row in history]
        if any(values):
            left.plot(epochs, values, color=color, marker="o", markersize=3, label=label)
    left.set_title("training loss", loc="left", fontweight="bold")
    if all(row.get("loss_total", 0.0) >= 0 for row in history):  # a likelihood can make it negative
        left.set_ylim(bottom=0)
    for name, color in COLORS.items():
        values = [row[f"val_ccc_{name}"] for row in history]
        right.plot(epochs, values, color=color, marker="o", markersize=3, label=name)
    means = np.array([row["val_ccc_mean"] for row in history])
    title = "validation CCC"
    if np.isfinite(means).any():
        best = int(np.nanargmax(means))
        right.axvline(epochs[best], color="#bbbbbb", linewidth=1, linestyle="--", zorder=0)
        title += f" (best mean {means[best]:.3f}, epoch {epochs[best]:g})"
    right.set_title(title, loc="left", fontweight="bold")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.legend(frameon=False, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    _save(figure, path, note)


def plot_agreement(path: Path, prediction: Floats, label: Floats, valid: Bools, note: str = "") -> None:
    """Plot the density of frames over labels and predictions, a panel per dimension.

    Args:
        prediction, label: [N, 2]; valid: [N, 2] labelled.
    """
    figure = _figure(9.4, 4.5)
    scores = concordance(prediction, np.where(valid, label, 0), valid)
    for k, (axes, name) in enumerate(zip(figure.subplots(1, 2), DIMENSIONS, strict=True)):
        mask = valid[:, k]
        axes.plot([-1, 1], [-1, 1], color="#999999", linewidth=1, linestyle="--", zorder=3)
        if mask.any():
            style: dict[str, Any] = {"gridsize": 40, "bins": "log", "cmap": "viridis", "mincnt": 1}
            mesh = axes.hexbin(label[mask, k], prediction[mask, k], extent=(-1, 1, -1, 1), **style)
            figure.colorbar(mesh, ax=axes, shrink=0.8).set_label("frames", fontsize=8)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), xlabel=f"label {name}", ylabel=f"predicted {name}", aspect="equal")
        axes.set_title(f"{name}: CCC {scores[k]:.3f}", loc="left", color=COLORS[name], fontweight="bold")
        _tidy(axes)
    _save(figure, path, note)


def draw_run(
    folder: Path, history: Sequence[Mapping[str, float]], traces: Sequence[Trace], note: str = ""
) -> list[Path]:
    """Draw training curves, agreement and the traces of a few labelled clips; returns the files in `pictures/`.

    `note` is small text below each of them.
    """
    figures = folder / "pictures"
    figures.mkdir(parents=True, exist_ok=True)
    labelled = [trace for trace in traces if trace.clip.valid.any()]
    files = []
    if history:
        files.append(figures / "training.png")
        plot_training(files[-1], history, note)
    if labelled:
        files.append(figures / "agreement.png")
        value = np.concatenate([trace.clip.value for trace in labelled])
        valid = np.concatenate([trace.clip.valid for trace in labelled])
        plot_agreement(files[-1], np.concatenate([trace.va for trace in labelled]), value, valid, note)
    for trace in labelled[:TRACES]:
        name = trace.clip.item.replace("/", "-").encode("utf-8", "replace")
        if len(name) > FILE_NAME:
            name = name[:FILE_NAME] + b"-" + blake2b(name, digest_size=4).hexdigest().encode()
        files.append(figures / f"trace-{name.decode('utf-8', 'ignore')}.png")
        plot_trace(files[-1], trace, note)
    return files


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: "Figure", panels: Any) -> None:
    """Draw one legend above all panels, every name once: predictions, label, missing input."""
    named: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        named = dict(zip(names, handles, strict=True)) | named
    last = ("no face", "no audio", "far", "95 %")
    order = sorted(named, key=lambda name: (name in last, name == "label", name != "predicted valence"))
    figure.legend(
        [named[name] for name in order], order, loc="outside upper right", ncols=len(order), frameon=False, fontsize=9
    )


def _save(figure: "Figure", path: Path, note: str = "") -> None:
    if note:
        figure.supxlabel(visible(note), x=0.01, ha="left", fontsize=8, color="#B34700", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # names of clips may be in any script; the font draws a box for what it lacks
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(path)
