"""Pictures of a run: traces with the nine-region read-out, training curves, predictions against labels.

matplotlib is imported when something is drawn, never before, and without its global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaflow.regions import REGION_NAMES
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train.batch import AUDIO, VISUAL
from vaflow.train.evaluate import Trace
from vaflow.train.metrics import DIMENSIONS, concordance
from vaflow.train.windows import WindowSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALENCE, AROUSAL, MEAN, LABEL = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
COLOURS = {"valence": VALENCE, "arousal": AROUSAL, "mean": MEAN}
NO_FACE, NO_SOUND = "#F0C24B", "#7A5AA0"
COLUMNS = 1200  # of the region strip: more than a picture shows
TRACES = 3  # clips drawn after training

Seen = tuple[Floats, Bools]  # instants [K], and whether the input was there [K]


def plot_trace(
    path: Path,
    time: Floats,
    va: Floats,
    *,
    label: Floats | None = None,
    regions: Floats | None = None,
    face: Seen | None = None,
    sound: Seen | None = None,
    title: str = "",
) -> None:
    """Valence and arousal of one clip over time, its label where there is one, and the nine regions below.

    Args:
        path: PNG to write.
        time: [R] seconds.
        va: [R, 2].
        label: [R, 2], NaN where not annotated.
        regions: [R, 9] probabilities.
        face, sound: when there was a face, and sound; shaded where not. None: not an input, not shaded.
        title: above the picture.
    """
    tall = regions is not None
    figure = _figure(11.5, 6.6 if tall else 4.2)
    ratios = [1, 1, 1.35] if tall else [1, 1]
    axes = figure.subplots(len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    for k, name in enumerate(DIMENSIONS):
        _trace_panel(axes[k], name, time, va[:, k], None if label is None else label[:, k])
        _shade(axes[k], face, NO_FACE, "no face", hatch="")
        _shade(axes[k], sound, NO_SOUND, "no sound", hatch="///")
    if regions is not None:
        _region_panel(figure, axes[-1], time, regions)
    axes[-1].set_xlabel("time (s)")
    edge = median_interval(time)
    axes[-1].set_xlim(float(time[0]) if len(time) else 0.0, float(time[-1]) + edge if len(time) else 1.0)
    _legend(figure, axes[:2])
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    _save(figure, path)


def _trace_panel(axes: "Axes", name: str, time: Floats, value: Floats, label: Floats | None) -> None:
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    if label is not None and np.isfinite(label).any():
        axes.plot(time, label, color=LABEL, linewidth=1.6, label="label", zorder=2)
    axes.plot(time, value, color=COLOURS[name], linewidth=1.7, label=f"predicted {name}", zorder=3)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylabel(name, color=COLOURS[name], fontweight="bold")
    _tidy(axes)


def _shade(axes: "Axes", seen: Seen | None, colour: str, name: str, hatch: str) -> None:
    """A band over every stretch without input."""
    if seen is None or not len(seen[0]):
        return
    instants, there = seen
    step = median_interval(instants)
    edges = np.diff(np.concatenate([[False], ~there, [False]]).astype(int))
    for first, last in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True):
        axes.axvspan(
            instants[first] - step / 2,
            instants[last - 1] + step / 2,
            facecolor=colour if not hatch else "none",
            edgecolor=colour,
            alpha=0.32 if not hatch else 0.55,
            hatch=hatch,
            linewidth=0,
            label=name,
            zorder=1,
        )


def _region_panel(figure: "Figure", axes: "Axes", time: Floats, regions: Floats) -> None:
    """A strip per region: how likely the read-out thinks it, over time."""
    if not len(time):
        return
    begin, end = float(time[0]), float(time[-1]) + median_interval(time)
    columns = min(COLUMNS, len(time))
    middle = begin + (np.arange(columns) + 0.5) * (end - begin) / columns
    resampled = np.stack([np.interp(middle, time, regions[:, k]) for k in range(9)])
    image = axes.imshow(
        resampled,
        aspect="auto",
        origin="lower",
        extent=(begin, end, -0.5, 8.5),
        cmap="magma_r",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_yticks(range(9), REGION_NAMES, fontsize=8)
    for edge in (2.5, 5.5):
        axes.axhline(edge, color="#888888", linewidth=0.8)
    axes.set_ylabel("region", fontweight="bold")
    axes.tick_params(length=0)
    inset = axes.inset_axes((1.008, 0.0, 0.012, 1.0))
    bar = figure.colorbar(image, cax=inset)
    bar.set_label("probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def plot_training(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Losses and validation CCC per epoch; the best epoch is marked.

    Args:
        path: PNG to write.
        history: rows as in `history.csv`.
    """
    figure = _figure(10.5, 3.8)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name, colour in (("total", MEAN), ("ccc", "#009E73"), ("kl", "#CC79A7")):
        values = [row.get(f"loss_{name}", 0.0) for row in history]
        if any(values):
            left.plot(epochs, values, color=colour, marker="o", markersize=3, label=_loss_name(name))
    left.set_title("training loss", loc="left", fontweight="bold")
    left.set_ylim(bottom=0)
    for name, colour in COLOURS.items():
        values = [row[f"val_ccc_{name}"] for row in history]
        right.plot(epochs, values, color=colour, marker="o", markersize=3, label=name)
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
    _save(figure, path)


def _loss_name(name: str) -> str:
    return {"total": "total", "ccc": "1 \N{MINUS SIGN} CCC", "kl": "KL (unweighted)"}[name]


def plot_agreement(path: Path, prediction: Floats, label: Floats, valid: Bools) -> None:
    """Predictions against labels, a panel per dimension: how many frames lie where.

    Args:
        path: PNG to write.
        prediction, label: [N, 2]; valid: [N, 2] what is labelled.
    """
    figure = _figure(9.4, 4.5)
    scores = concordance(prediction, np.where(valid, label, 0), valid)
    for k, (axes, name) in enumerate(zip(figure.subplots(1, 2), DIMENSIONS, strict=True)):
        own = valid[:, k]
        axes.plot([-1, 1], [-1, 1], color="#999999", linewidth=1, linestyle="--", zorder=3)
        if own.any():
            mesh = axes.hexbin(
                label[own, k],
                prediction[own, k],
                gridsize=40,
                extent=(-1, 1, -1, 1),
                bins="log",
                cmap="viridis",
                mincnt=1,
            )
            figure.colorbar(mesh, ax=axes, shrink=0.8).set_label("frames", fontsize=8)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), xlabel=f"label {name}", ylabel=f"predicted {name}", aspect="equal")
        axes.set_title(f"{name}: CCC {scores[k]:.3f}", loc="left", color=COLOURS[name], fontweight="bold")
        _tidy(axes)
    _save(figure, path)


def draw_trace(path: Path, trace: Trace, windows: WindowSet, title: str = "") -> None:
    """The picture of one clip's trace; shaded where its face or its sound is missing."""
    kinds = {stream.kind for stream in windows.streams}
    plot_trace(
        path,
        trace.clip.time,
        trace.va,
        label=np.where(trace.clip.valid, trace.clip.value, np.nan),
        regions=trace.regions,
        face=windows.seen(trace.clip, VISUAL) if VISUAL in kinds else None,
        sound=windows.seen(trace.clip, AUDIO) if AUDIO in kinds else None,
        title=title or trace.clip.item,
    )


def draw_run(
    folder: Path, history: Sequence[Mapping[str, float]], windows: WindowSet, traces: Sequence[Trace]
) -> list[Path]:
    """Training curves, agreement and the traces of a few labelled clips into `folder/pictures`; returns the files."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    labelled = [trace for trace in traces if trace.clip.valid.any()]
    files = []
    if history:
        files.append(pictures / "training.png")
        plot_training(files[-1], history)
    if labelled:
        files.append(pictures / "agreement.png")
        value = np.concatenate([trace.clip.value for trace in labelled])
        valid = np.concatenate([trace.clip.valid for trace in labelled])
        plot_agreement(files[-1], np.concatenate([trace.va for trace in labelled]), value, valid)
    for trace in labelled[:TRACES]:
        files.append(pictures / f"trace-{trace.clip.item.replace('/', '-')}.png")
        draw_trace(files[-1], trace, windows)
    return files


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: "Figure", panels: Any) -> None:
    """One legend above all panels, every name once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        found |= {name: handle for name, handle in zip(names, handles, strict=True) if name not in found}
    order = sorted(found, key=lambda name: (name.startswith("no "), name == "label", list(found).index(name)))
    figure.legend(
        [found[name] for name in order], order, loc="outside upper right", ncols=len(order), frameon=False, fontsize=9
    )


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
