"""`vaflow evaluate`, `vaflow smooth`, `vaflow ensemble` and `vaflow folds`: scores of finished runs, and folds."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from vaflow.cli.common import Output, echo, interval, loading, number, print_json, table
from vaflow.cli.options import AllowMissing, Cache, Device, ModelOutputs, MovedCache, Run, argument, option, variant
from vaflow.errors import UsageError, explain

OtherCache = Annotated[Path | None, option("CACHE", "Another cache than the run was trained on.")]
Split = Annotated[str | None, option("SPLIT", "Split to score.", default="the run's validation split")]
Smooth = Annotated[
    str | None,
    option("KIND", "Smoothing for this evaluation only: mean, savgol or none.", default="as stored by `vaflow smooth`"),
]
Width = Annotated[str, option("SECONDS", "Width of the smoothing; auto: the best one on the run's validation split.")]
Without = Annotated[str | None, option("MODALITY", "Mark a modality as missing everywhere: visual or audio.")]
Groups = Annotated[Path | None, option("FILE", "Also score each group: CSV with item and columns such as gender, age.")]

Kind = Annotated[str, option("KIND", "mean, savgol, or none to remove the stored one.")]

FoldCount = Annotated[int, option("K", "Number of folds.", "--folds")]
FoldSplits = Annotated[
    list[str] | None, option("SPLIT", "Split to divide. Repeatable.", "--split", default="train and val")
]
FoldGroups = Annotated[
    str | None,
    option(
        "FILE:COLUMN",
        "Column whose groups stay in one fold, as groups.csv:speaker.",
        "--fold-groups",
        default="source video",
    ),
]

Members = Annotated[list[Path], argument("RUN", "Finished runs.")]
EnsembleOut = Annotated[Path, option("DIR", "Ensemble directory.")]
MemberWeights = Annotated[
    str, option("HOW", "mean; ccc: proportional to each run's CCC; search: maximize the CCC. Per dimension.")
]
EnsembleCache = Annotated[Path | None, variant(OtherCache, help="Another cache than the first run was trained on.")]
EnsembleSplit = Annotated[str | None, variant(Split, show_default="the runs' validation split")]
WeightsSplit = Annotated[
    str | None, option("SPLIT", "Split that ccc and search use.", default="the runs' validation split")
]


def evaluate(
    output: Output,
    run: Run,
    cache: OtherCache = None,
    split: Split = None,
    smooth: Smooth = None,
    smooth_seconds: Width = "auto",
    without: Without = None,
    groups: Groups = None,
    va: ModelOutputs = None,
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> int:
    """Score a run on every annotated frame of a split: CCC with its interval, CCC within videos, errors.

    Predictions are written to RUN/predictions/SPLIT/.

    Example: vaflow evaluate runs/full --split val --json

    Example: vaflow evaluate runs/full --smooth savgol --smooth-seconds 1.5

    Example: vaflow evaluate runs/full --without audio --groups groups.csv

    Example: vaflow evaluate onnx:hsemotion.onnx --va 8,9 --cache affwild2.cache
    """
    width = smoothing_width(smooth_seconds)
    if str(run).startswith("onnx:"):
        metrics = _evaluate_model(str(run), cache, split or "val", va, smooth, width, allow_missing)
        print_metrics(metrics, output)
        return 0
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.groups import read_groups, warn_unknown
        from vaflow.train.runs import cache_of
        from vaflow.train.training import choose_smoothing, evaluate_run

    opened = open_cache(cache if cache is not None else cache_of(run))
    bars = output.bars
    named = read_groups(groups) if groups else None
    if named is not None:
        warn_unknown(named, opened)
    smoothing: Any = "stored"
    if smooth is not None:
        smoothing = choose_smoothing(run, opened, smooth, width, device=device, show=bars)
    metrics = evaluate_run(
        *(run, opened, split),
        device=device,
        allow_missing=allow_missing,
        show=bars,
        without=without,
        groups=named,
        smoothing=smoothing,
    )
    print_metrics(metrics, output)
    return 0


def _evaluate_model(
    name: str,
    cache: Path | None,
    split: str,
    va: str | None,
    smooth: str | None,
    width: float | None,
    allow_missing: bool,
) -> dict[str, Any]:
    """The metrics of a pretrained model, which has no run directory and no training."""
    from vaflow.cache import open_cache
    from vaflow.pretrained import Columns, evaluate_model
    from vaflow.train.smoothing import Smoothing

    columns = Columns.parse(va, name)
    if cache is None:
        raise UsageError(explain(f"Evaluating {name} requires a cache", expected="--cache CACHE"))
    smoothing = None
    if smooth not in (None, "none"):
        if width is None:
            raise UsageError(explain("--smooth-seconds auto requires a run", expected="--smooth-seconds SECONDS"))
        smoothing = Smoothing(str(smooth), width)
    return evaluate_model(name, columns, open_cache(cache), split, smoothing=smoothing, allow_missing=allow_missing)


def smooth(
    output: Output,
    run: Run,
    kind: Kind = "mean",
    seconds: Width = "auto",
    cache: MovedCache = None,
    device: Device = "auto",
) -> int:
    """Choose a smoothing for a run and store it: `evaluate`, `predict` and `submit` then apply it.

    The standard deviations of a run with a variance head are calibrated again.

    Example: vaflow smooth runs/full --kind savgol

    Example: vaflow smooth runs/full --kind none
    """
    width = smoothing_width(seconds)
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.runs import cache_of
        from vaflow.train.training import choose_smoothing, store_smoothing

    opened = open_cache(cache if cache is not None else cache_of(run))
    chosen = choose_smoothing(run, opened, kind, width, device=device, show=output.bars)
    store_smoothing(run, opened, chosen, device=device, show=output.bars)
    if output.json:
        print_json(None if chosen is None else chosen.summary | {"scores": dict(chosen.scores)})
    elif not output.quiet and chosen is None:
        echo(f"Removed the smoothing of {run}.")
    elif not output.quiet and chosen is not None:
        if chosen.scores:
            rows = [(f"{float(w):g}", f"{value:.4f}") for w, value in chosen.scores.items()]
            echo(f"{table(rows, ('seconds', 'mean CCC'))}\n")
        best = f"{chosen.kind}, {chosen.seconds:g} s" if chosen.seconds else "no smoothing, which scored best"
        echo(f"Stored in {run}: {best}.")
    return 0


def print_metrics(metrics: dict[str, Any], output: Output) -> None:
    """Print the metrics as JSON, or as tables with warnings on standard error."""
    groups = metrics.get("by_group", {}).items()
    output.result(lambda: metrics, lambda: "\n\n".join([summary(metrics), *(group_table(*group) for group in groups)]))
    for warning in () if output.json or output.quiet else metrics["warnings"]:
        echo(f"warning: {warning}", err=True)


def summary(metrics: dict[str, Any]) -> str:
    """The headline metrics as a table."""
    names = ("valence", "arousal", "mean")
    spans = [metrics["ci95"][name] for name in names]
    rows = [
        (label, *(number(metrics[key][name], ".4f") for name in names))
        for label, key in (
            ("CCC", "ccc"),
            ("CCC within videos", "within_video_ccc"),
            ("Pearson", "pearson"),
            ("RMSE", "rmse"),
        )
    ]
    rows.insert(1, ("95 % interval", *(interval(s, ".4f") for s in spans)))
    from vaflow.train.metrics import scope

    text = f"{scope(metrics)}\n\n{table(rows, ('', *names))}"
    if "coverage" in metrics:
        covered = metrics["coverage"]
        levels = list(covered["valence"])
        rows = [(f"{level} %", *(_percent(covered[name][level]) for name in covered)) for level in levels]
        text += f"\n\n{table(rows, ('interval', *covered))}\n\n"
        text += f"Share of the labels inside the intervals; {metrics['uncertainty']['held_out']}."
    if metrics["n_videos"] < 2:
        text += "\n\nNo interval: it needs at least two source videos."
    for name, scores in metrics.get("extra", {}).items():
        f1 = [(label, number(value, ".4f")) for label, value in scores["f1"].items()]
        rows = [*f1, ("mean", number(scores["macro_f1"], ".4f"))]
        text += f"\n\n{name}, {scores['n_frames']} labelled frames\n\n{table(rows, (scores['task'], 'F1'))}"
    return text


def group_table(kind: str, parts: dict[str, Any]) -> str:
    """Scores of one kind of group as a table."""
    names = ("valence", "arousal", "mean")
    rows = [
        (group, part["n_clips"], part["n_frames"], *(number(part["ccc"][name], ".4f") for name in names))
        for group, part in parts.items()
    ]
    return table(rows, (kind, "clips", "frames", *(f"CCC {name}" for name in names)))


def smoothing_width(text: str) -> float | None:
    """Value of --smooth-seconds; None: auto.

    Raises:
        UsageError: neither auto nor a number.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(explain(f"The smoothing width must be auto or a number of seconds (got {text})")) from error


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def folds(
    output: Output, cache: Cache, count: FoldCount = 5, splits: FoldSplits = None, groups: FoldGroups = None
) -> int:
    """Show the folds of a cross-validation, as `vaflow train --folds K --fold I` uses them.

    The clips of a source video (_left and _right) stay in one fold. Folds have about equal numbers of labelled frames
    and are the same every time.

    Example: vaflow folds affwild2.cache --folds 5

    Example: vaflow folds affwild2.cache --folds 5 --fold-groups groups.csv:speaker
    """
    from vaflow.cache import open_cache
    from vaflow.train.config import TrainConfig
    from vaflow.train.groups import make_folds, read_column, warn_unknown

    opened = open_cache(cache)
    members = read_column(groups) if groups else None
    if members is not None:
        warn_unknown({"": members}, opened)
    parts = make_folds(opened, tuple(splits or TrainConfig.fold_splits), count, members)
    noun = "videos" if groups is None else groups.rpartition(":")[2]
    facts = [
        {"fold": k, noun: list(part.groups), "clips": list(part.items), "labelled_frames": part.labelled}
        for k, part in enumerate(parts, 1)
    ]
    if output.json:
        print_json(facts)
    elif not output.quiet:
        used = Counter(str(opened.meta(item).get("split") or "none") for part in parts for item in part.items)
        echo(f"Clips divided: {', '.join(f'{n} of split {name}' for name, n in sorted(used.items()))}\n")
        rows = [(k, len(part.groups), len(part.items), part.labelled) for k, part in enumerate(parts, 1)]
        echo(table(rows, ("fold", noun, "clips", "labelled frames")))
        if output.verbose:
            for k, part in enumerate(parts, 1):
                echo(f"\nfold {k}: {', '.join(part.items)}")
    return 0


def ensemble(
    output: Output,
    runs: Members,
    out: EnsembleOut,
    weights: MemberWeights = "mean",
    cache: EnsembleCache = None,
    split: EnsembleSplit = None,
    weights_split: WeightsSplit = None,
    device: Device = "auto",
    allow_missing: AllowMissing = False,
) -> int:
    """Average the predictions of several runs, frame by frame; their windows and streams may differ.

    Writes DIR/predictions/SPLIT/, DIR/metrics.json and DIR/ensemble.json (the weights). Weights tuned on the scored
    split make the score optimistic: use another split for --weights-split if possible.

    Example: vaflow ensemble runs/full runs/tcn runs/seed1 --out runs/ensemble --weights ccc
    """
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.ensemble import ensemble_runs

    made, metrics = ensemble_runs(
        runs,
        out,
        weights,
        cache=None if cache is None else open_cache(cache),
        split=split,
        weights_split=weights_split,
        device=device,
        allow_missing=allow_missing,
        show=output.bars,
    )
    print_metrics(metrics, output)
    if not (output.json or output.quiet):
        rows = [(run, *(f"{w:.3f}" for w in row)) for run, row in zip(runs, made.table.tolist(), strict=True)]
        echo(f"\n{table(rows, ('weights', 'valence', 'arousal'))}")
    return 0
