"""`vaflow train`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import Cache, JsonFlag, Quiet, Verbose, alias_pairs, print_json, set_up, show_bars, weight_pairs
from vaflow.cli.evaluate import summary
from vaflow.cli.options import HelpAll, with_settings
from vaflow.train import config as configs
from vaflow.train import settings_files
from vaflow.train.config import TrainConfig


@with_settings(TrainConfig)
def train(
    cache: Cache,
    *,
    options: dict[str, Any] | None = None,
    aliases: Annotated[
        list[str] | None,
        typer.Option(
            "--alias",
            metavar="NAME=OTHER",
            help="Use stream OTHER where a preset names NAME. Repeatable.",
            rich_help_panel="Data",
            hidden=True,
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Score the validation split even if labelled clips have no features.",
            rich_help_panel="Data",
            hidden=True,
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Settings of a published system: p1 or p2.", rich_help_panel="Model"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of settings, or a run's config.toml.", rich_help_panel="Model", hidden=True
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting. Repeatable.", rich_help_panel="Model"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Local weights of an encoder to fine-tune, instead of the hub's. Repeatable.",
            rich_help_panel="Fine-tuning",
            hidden=True,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Delete the run in --out first.", rich_help_panel="Output", hidden=True),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Directory of the run.", show_default=False, rich_help_panel="Output")
    ],
    help_all: HelpAll = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Train a model on a cache; with --finetune, train its encoders as well. Run it again to resume.

    Settings come from --preset, --config, the options and --set; each overrides those before it.

    Example: vaflow train affwild2.cache --out runs/full

    Example: vaflow train affwild2.cache --out runs/tcn --temporal tcn --fusion gated --set causal=false

    Example: vaflow train affwild2.cache --out runs/tuned --finetune --set init=runs/full --set finetune_blocks=4
    """
    set_up(verbose, quiet)
    merged = configs.merge(
        settings_files.preset(preset) if preset else {},
        settings_files.read_settings(config) if config else {},
        options or {},
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
        fresh=fresh,
        show=show_bars(quiet or json),
    )
    if os.environ.get("RANK", "0") != "0":  # of several processes that torchrun started, one prints
        return 0
    if json:
        print_json(result.metrics)
    elif not quiet:
        if result.was_done:
            typer.echo(
                f"{out} is finished already. Choose another --out for other settings, or --fresh to start again."
            )
        typer.echo(summary(result.metrics))
        for stream, shares in result.metrics.get("layer_shares", {}).items():
            typer.echo(f"\nlayers of {stream}: " + ", ".join(f"{share:.2f}" for share in shares))
        if "best_epoch" in result.metrics:
            typer.echo(f"\nbest epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}; written to {out}")
    return 0
