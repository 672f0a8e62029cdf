"""`vaflow train` and `vaflow evaluate`.

`vaflow folds`.

`vaflow ensemble`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, alias_pairs, print_json, set_up, show_bars, table, weight_pairs
from vaflow.errors import UsageError, explain

Cache = Annotated[Path, typer.Argument(metavar="CACHE", help="What `vaflow extract` wrote.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="What `vaflow train --out` wrote.", show_default=False)]
RunOrEnsemble = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="What `vaflow train` or `vaflow ensemble` wrote to --out.", show_default=False),
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Score a split although labelled clips have no features.")
]


def train(
    cache: Cache,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of settings, or a run's config.toml.")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="p1 or p2: a published system.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting; docs/options.md has them all. Repeatable."),
    ] = None,
    visual: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Visual stream, or none. Repeatable.")
    ] = None,
    audio: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Audio stream, or none. Repeatable.")] = None,
    aliases: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="NAME=OTHER", help="Stream OTHER stands in for NAME. Repeatable."),
    ] = None,
    window: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds per training window; the cache's.")
    ] = None,
    stride: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds between windows; the cache's.")
    ] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Frames per window; the cache's.")] = None,
    temporal: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="gru, tcn (29 steps back; --set layers=4: 61), lstm or transformer. [gru]"),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="hierarchical, attention, gated, concat or attention-concat. [hierarchical]"),
    ] = None,
    centers: Annotated[
        float | None, typer.Option(metavar="X", help="Distance of the outer region centres from 0. [0.66]")
    ] = None,
    sigma: Annotated[float | None, typer.Option(metavar="X", help="Width of the soft labels. [0.45]")] = None,
    kl_weight: Annotated[
        float | None, typer.Option(metavar="X", help="Weight of the prompt loss; 0 leaves the prompt head out. [0.2]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training windows. [15]")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Windows per step. [16]")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate. [1e-4]")] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="Of AdamW. [1e-4]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of weights, shuffling and dropout. [0]")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N]. [auto]")] = None,
    folds: Annotated[
        int | None, typer.Option(metavar="K", help="Cross-validate: parts by source video; see `vaflow folds`.")
    ] = None,
    fold: Annotated[
        int | None, typer.Option(metavar="I", help="Validate on this part, from 1; train on the others. [1]")
    ] = None,
    finetune: Annotated[
        bool | None, typer.Option("--finetune", help="Train CLIP and AST, too, from the cached pixels and log-Mel.")
    ] = None,
    backbone_lr: Annotated[float | None, typer.Option(metavar="X", help="Their learning rate. [3e-6]")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Their local weights instead of the hub. Repeatable.")
    ] = None,
    allow_missing: AllowMissing = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Train heads on a cache, and with --finetune its encoders; interrupted, the same command goes on where it stopped.

    Settings come from --preset, then --config, then the options, then --set; each wins over those before.

    Example: vaflow train affwild2.cache --out runs/full

    Example: vaflow train affwild2.cache --out runs/tcn --temporal tcn --fusion gated --set causal=false

    Example: vaflow train affwild2.cache --out runs/fold2 --folds 5 --fold 2

    Example: vaflow train affwild2.cache --out runs/robust --set modality_dropout=0.1 --set best=each

    Example: vaflow train tiny.cache --out runs/p2 --preset p2 --alias resnet50=resnet-tiny --alias vggish=vggish-tiny

    Example: vaflow train affwild2.cache --out runs/tuned --finetune --set init=runs/full --set finetune_blocks=4
    """
    options = {
        "visual": visual,
        "audio": audio,
        "window": window,
        "stride": stride,
        "frames": frames,
        "temporal": temporal,
        "fusion": fusion,
        "centers": centers,
        "sigma": sigma,
        "kl_weight": kl_weight,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "device": device,
        "folds": folds,
        "fold": fold,
        "finetune": finetune,
        "backbone_lr": backbone_lr,
    }
    set_up(verbose, quiet)
    from vaflow.train import config as configs

    merged = configs.merge(
        configs.preset(preset) if preset else {},
        configs.read_settings(config) if config else {},
        {key: value for key, value in options.items() if value not in (None, [])},
        configs.parse_settings(settings or []),
    )
    merged = configs.with_aliases(merged, alias_pairs(aliases or []))
    from vaflow.cache import open_cache
    from vaflow.train.training import train_run

    result = train_run(
        open_cache(cache),
        merged,
        out,
        weights=weight_pairs(weights or []),
        allow_missing=allow_missing,
        show=show_bars(quiet),
    )
    if quiet or os.environ.get("RANK", "0") != "0":  # of several processes that torchrun started, one speaks
        return 0
    if result.was_done:
        typer.echo(f"{out} is done already: nothing to train. Another --out, or other settings, begin a new run.")
    typer.echo(summary(result.metrics))
    if "best_epoch" in result.metrics:
        typer.echo(f"\nbest epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}; written to {out}")
    return 0


def evaluate(
    run: Run,
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Another cache than the run was trained on.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Which split; the run's validation split.")] = None,
    smooth: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="mean or savgol: smooth this run's predictions from now on; none: no longer do so."
        ),
    ] = None,
    smooth_seconds: Annotated[
        str,
        typer.Option(metavar="SECONDS", help="Width of the smoothing; auto: the best on the run's validation split."),
    ] = "auto",
    without: Annotated[
        str | None, typer.Option(metavar="MODALITY", help="visual or audio: mark that modality as missing everywhere.")
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV with item and columns such as gender, age: metrics of each group."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    allow_missing: AllowMissing = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Score a run on every annotated frame of a split: concordance with its interval, within videos, errors.

    Predictions are written to RUN/predictions/SPLIT/. A smoothing is kept in RUN/smoothing.json, and `predict` and
    `submit` apply it, too.

    Example: vaflow evaluate runs/full --split val --json

    Example: vaflow evaluate runs/full --smooth savgol --smooth-seconds auto

    Example: vaflow evaluate runs/full --without audio --groups groups.csv
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.breakdown import read_groups
    from vaflow.train.runs import require_record
    from vaflow.train.training import evaluate_run

    path = cache if cache is not None else Path(require_record(run).cache)
    opened, bars = open_cache(path), show_bars(quiet or json)
    named = read_groups(groups) if groups else None
    if smooth is not None:
        from vaflow.train.smoothing_choice import set_smoothing

        set_smoothing(run, opened, smooth, smoothing_width(smooth_seconds), device=device, show=bars)
    metrics = evaluate_run(
        *(run, opened, split),
        device=device,
        allow_missing=allow_missing,
        show=bars,
        without=without,
        groups=named,
    )
    if json:
        print_json(metrics)
    else:
        typer.echo(summary(metrics))
        for kind, parts in metrics.get("by_group", {}).items():
            typer.echo(f"\n{group_table(kind, parts)}")
        for warning in metrics["warnings"]:
            typer.echo(f"warning: {warning}", err=True)
    return 0


def summary(metrics: dict[str, Any]) -> str:
    """The metrics as a table for people."""
    names = ("valence", "arousal", "mean")
    interval = [_span(metrics["ci95"][name]) for name in names]
    within = metrics["within_video_ccc"]
    rows = [
        ("CCC", *(_digits(metrics["ccc"][name]) for name in names)),
        ("95 % interval", *interval),
        ("CCC within videos", *(_digits(within[name]) for name in names)),
        ("Pearson", *(_digits(metrics["pearson"][name]) for name in names)),
        ("RMSE", *(_digits(metrics["rmse"][name]) for name in names)),
    ]
    scope = f"{metrics['split']}: {metrics['n_frames']} labelled frames of {metrics['n_videos']} videos"
    lost = metrics["missing"]["frames"]
    if lost or metrics["missing"]["clips"]:
        scope += f"; left out: {lost} frames, {len(metrics['missing']['clips'])} clips without features"
    if "without" in metrics:
        scope += f"; without {metrics['without']}"
    if "smoothing" in metrics:
        scope += "; smoothed: {kind}, {seconds:g} s".format(**metrics["smoothing"])
        if metrics["smoothing"]["chosen_on"] == metrics["split"]:
            scope += ", chosen on these very labels: the score flatters"
    return f"{scope}\n\n{table(rows, ('', *names))}"


def group_table(kind: str, parts: dict[str, Any]) -> str:
    """One kind of group as a table for people."""
    names = ("valence", "arousal", "mean")
    rows = [
        (group, part["n_clips"], part["n_frames"], *(_digits(part["ccc"][name]) for name in names))
        for group, part in parts.items()
    ]
    return table(rows, (kind, "clips", "frames", *(f"CCC {name}" for name in names)))


def smoothing_width(text: str) -> float | None:
    """What --smooth-seconds says; None: auto.

    Raises:
        UsageError: neither auto nor a number.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(explain("--smooth-seconds is not a width", expected="seconds, or auto", got=text)) from error


def _span(edges: Sequence[float | None]) -> str:
    return "-" if None in edges else "..".join(_digits(edge) for edge in edges)


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def folds(
    cache: Cache,
    count: Annotated[int, typer.Option("--folds", metavar="K", help="How many parts.")] = 5,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="SPLIT", help="Divide the clips of this split. Repeatable. [train, val]"),
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Show the parts of a cross-validation, as `vaflow train --folds K --fold I` takes them.

    A source video is never divided: its _left and _right stay together. Parts have about as many labelled frames each,
    and are the same every time.

    Example: vaflow folds affwild2.cache --folds 5
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.config import TrainConfig
    from vaflow.train.folds import make_folds

    parts = make_folds(open_cache(cache), splits or TrainConfig().fold_splits, count)
    facts = [
        {"fold": k, "videos": list(part.groups), "clips": list(part.items), "labelled_frames": part.labelled}
        for k, part in enumerate(parts, 1)
    ]
    if json:
        print_json(facts)
        return 0
    rows = [(k, len(part.groups), len(part.items), part.labelled) for k, part in enumerate(parts, 1)]
    typer.echo(table(rows, ("fold", "videos", "clips", "labelled frames")))
    if verbose:
        for k, part in enumerate(parts, 1):
            typer.echo(f"\nfold {k}: {', '.join(part.items)}")
    return 0


def ensemble(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Finished runs.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the ensemble.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="mean; ccc: in proportion to each run's CCC, per dimension; "
            "search: those with the best CCC, per dimension.",
        ),
    ] = "mean",
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Another cache than the first run was trained on.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Which split; the runs' validation split.")] = None,
    weights_split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Where ccc and search look; the runs' validation split.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    allow_missing: AllowMissing = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Average the predictions of several runs, frame by frame; their windows and streams may differ.

    Writes DIR/predictions/SPLIT/, DIR/metrics.json and DIR/ensemble.json (the weights). Weights that are found on the
    split that is scored flatter the score: name another with --weights-split where there is one.

    Example: vaflow ensemble runs/full runs/tcn runs/seed1 --out runs/ensemble --weights ccc
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
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
        show=show_bars(quiet or json),
    )
    if json:
        print_json(metrics)
    elif not quiet:
        rows = [(run, *(f"{w:.3f}" for w in row)) for run, row in zip(runs, made.table.tolist(), strict=True)]
        typer.echo(f"{summary(metrics)}\n\n{table(rows, ('weights', 'valence', 'arousal'))}")
    if not json:
        for warning in metrics["warnings"]:
            typer.echo(f"warning: {warning}", err=True)
    return 0
