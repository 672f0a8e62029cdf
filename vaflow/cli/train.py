"""`vaflow train`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vaflow.cli.common import (
    FAILED,
    SOME_FAILED,
    Output,
    alias_pairs,
    check_directory,
    echo,
    loading,
    number,
    table,
    weight_pairs,
)
from vaflow.cli.evaluate import summary
from vaflow.cli.options import Aliases, AllowMissing, Cache, HelpAll, Weights, flag, grouped, option
from vaflow.errors import UsageError, explain, visible
from vaflow.settings import parse_pairs
from vaflow.train import config as configs
from vaflow.train.config import TrainConfig

if TYPE_CHECKING:
    from vaflow.cache import Cache as VACache
    from vaflow.train.together import Repeats
    from vaflow.train.training import Result


PresetAliases = Annotated[
    list[str] | None, grouped("Data", Aliases, help="Use stream OTHER where a preset names NAME. Repeatable.")
]
AllowMissingInValidation = Annotated[
    bool, grouped("Data", AllowMissing, help="Score the validation split even if labelled clips have no features.")
]
Preset = Annotated[
    str | None, grouped("Model", option("NAME", "Settings of a published system: p1 or p2."), shown=True)
]
SettingsFile = Annotated[
    Path | None, grouped("Model", option("FILE", "TOML file of settings, or a run's config.toml."))
]
Settings = Annotated[
    list[str] | None, grouped("Model", option("KEY=VALUE", "Any setting. Repeatable.", "--set"), shown=True)
]
FinetunedWeights = Annotated[
    list[str] | None,
    grouped("Fine-tuning", Weights, help="Local weights of an encoder to fine-tune, instead of the hub's. Repeatable."),
]
Seeds = Annotated[
    int | None, grouped("Output", option("N", "Train N seeds, counted up from --seed, each in RUN/seed<S>."))
]
AllFolds = Annotated[bool, grouped("Output", flag("Train every fold of --folds, each in RUN/fold<I>.", "--all-folds"))]
Together = Annotated[
    str, grouped("Output", option("WHEN", "Train seeds and folds in a batch: auto (if faster), always, never."))
]
Fresh = Annotated[bool, grouped("Output", flag("Delete the run in --out first.", "--fresh"))]
Out = Annotated[Path, grouped("Output", option("RUN", "Directory of the run."), shown=True)]


def train(
    output: Output,
    cache: Cache,
    *,
    options: dict[str, Any],
    aliases: PresetAliases = None,
    allow_missing: AllowMissingInValidation = False,
    preset: Preset = None,
    config: SettingsFile = None,
    settings: Settings = None,
    weights: FinetunedWeights = None,
    seeds: Seeds = None,
    all_folds: AllFolds = False,
    together: Together = "auto",
    fresh: Fresh = False,
    out: Out,
    help_all: HelpAll = False,
) -> int:
    """Train a model on a cache; with --finetune, train its encoders as well. Run it again to resume.

    Settings come from --preset, --config, the options and --set; each overrides those before it.

    Example: vaflow train affwild2.cache --out runs/full

    Example: vaflow train affwild2.cache --out runs/tcn --temporal tcn --fusion gated --set causal=false

    Example: vaflow train affwild2.cache --out runs/cv --folds 5 --all-folds

    Example: vaflow train affwild2.cache --out runs/tuned --finetune --set init=runs/full --set finetune_blocks=4
    """
    merged = configs.merge(
        configs.preset(preset) if preset else {},
        configs.read_settings(config) if config else {},
        options,
        parse_pairs(TrainConfig, settings or []),
    )
    merged = configs.with_aliases(merged, alias_pairs(aliases or []))
    check_directory(out)
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.together import repeats_of
        from vaflow.train.training import train_run

    if seeds is not None or all_folds:
        if fresh or weights:
            raise UsageError(explain("--seeds and --all-folds exclude --fresh and --weights"))
        runs = repeats_of(merged, 1 if seeds is None else seeds, all_folds)
        return _train_repeats(open_cache(cache), runs, out, together, allow_missing, output)
    result = train_run(
        open_cache(cache),
        merged,
        out,
        weights=weight_pairs(weights or []),
        allow_missing=allow_missing,
        fresh=fresh,
        show=output.bars,
    )
    if os.environ.get("RANK", "0") != "0":  # of several processes that torchrun started, one prints
        return 0
    output.result(lambda: result.metrics, lambda: training_summary(result, out))
    return 0


def training_summary(result: "Result", out: Path) -> str:
    """The metrics of a run, the shares of encoder layers that it mixes, and its best epoch."""
    text = summary(result.metrics)
    if result.was_done:
        text = f"{out} is finished already. Train longer with more --epochs, or start again with --fresh.\n{text}"
    for stream, shares in result.metrics.get("layer_shares", {}).items():
        text += f"\n\nlayers of {stream}: " + ", ".join(f"{share:.2f}" for share in shares)
    if "best_epoch" in result.metrics:
        text += f"\n\nbest epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}; written to {out}"
    return text


def _train_repeats(
    cache: "VACache", runs: dict[str, TrainConfig], out: Path, together: str, allow_missing: bool, output: Output
) -> int:
    """Train several runs, and print their scores."""
    from tqdm import tqdm

    from vaflow.train.together import train_repeats

    with tqdm(total=len(runs), unit="run", desc="train", disable=not output.bars) as bar:

        def report(name: str, score: float | None) -> None:
            bar.update()
            if not output.quiet:
                bar.write(f"{name}: mean CCC {number(score)}", file=sys.stderr)

        repeats = train_repeats(
            cache,
            runs,
            out,
            together=together,
            allow_missing=allow_missing,
            level=output.worker_level,
            on_run=report,
            on_choice=lambda text: None if output.quiet else bar.write(text, file=sys.stderr),
        )
    errors = list(repeats.failures.values())
    if not repeats.scores and isinstance(errors[0], UsageError) and len(set(map(str, errors))) == 1:
        raise errors[0]  # of the command, not of a run
    for name, error in repeats.failures.items():
        echo(visible(f"failed: {name}: {error}"), err=True)
    output.result(repeats.document, lambda: repeats_summary(repeats))
    return 0 if not repeats.failures else SOME_FAILED if repeats.scores else FAILED


def repeats_summary(repeats: "Repeats") -> str:
    """A row per run, and the mean and deviation over the runs."""
    names = ("valence", "arousal", "mean")
    rows = [(run, *(number(s[k]) for k in names)) for run, s in repeats.scores.items()]
    summary = repeats.document()["ccc"]
    for part in ("mean", "std"):
        values = [summary.get(k, {}).get(part) for k in names]
        rows.append((part, *map(number, values)))
    return table(rows, ("CCC", *names))
