"""`vaflow train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import AllowMissing, Cache, Quiet, Verbose, alias_pairs, set_up, show_bars, weight_pairs
from vaflow.cli.evaluate import summary


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
