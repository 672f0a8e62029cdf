"""`vaflow train`, `evaluate`, `smooth` and `ensemble`: training and scoring."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vaflow.cli.common import (
    Output,
    alias_pairs,
    check_directory,
    echo,
    interval,
    loading,
    number,
    print_json,
    table,
    weight_pairs,
)
from vaflow.cli.options import (
    Aliases,
    AllowMissing,
    Cache,
    Device,
    HelpAll,
    ModelOutputs,
    MovedCache,
    RunPath,
    Weights,
    argument,
    flag,
    grouped,
    option,
    variant,
)
from vaflow.errors import BAD_USAGE, FAILED, SOME_FAILED, UsageError, explain, visible
from vaflow.settings import parse_pairs
from vaflow.train import config as configs
from vaflow.train.config import TrainConfig

if TYPE_CHECKING:
    from vaflow.cache import Cache as VACache
    from vaflow.train.repeats import Repeats
    from vaflow.train.train_run import Result


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
Fresh = Annotated[
    bool, grouped("Output", flag("Delete the run in --out first; with --seeds or --all-folds, these runs.", "--fresh"))
]
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

    opened = open_cache(cache)
    with loading(output):
        from vaflow.train.repeats import repeats_of
        from vaflow.train.train_run import train_run

    given: dict[str, Any] = {"allow_missing": allow_missing, "fresh": fresh}
    if seeds is not None or all_folds:
        if weights:
            raise UsageError(explain("--seeds and --all-folds exclude --weights"))
        runs = repeats_of(merged, 1 if seeds is None else seeds, all_folds)
        return _train_repeats(opened, runs, out, {"together": together, **given}, output)
    result = train_run(opened, merged, out, weights=weight_pairs(weights or []), show=output.bars, **given)
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
    cache: "VACache", runs: dict[str, TrainConfig], out: Path, options: dict[str, Any], output: Output
) -> int:
    """Train several runs, and print their scores."""
    from tqdm import tqdm

    from vaflow.train.repeats import train_repeats

    with tqdm(total=len(runs), unit="run", desc="train", disable=not output.bars) as bar:

        def report(name: str, score: float | None) -> None:
            bar.update()
            if not output.quiet:
                bar.write(f"{name}: mean CCC {number(score)}", file=sys.stderr)

        repeats = train_repeats(
            cache,
            runs,
            out,
            **options,
            level=output.worker_level,
            on_run=report,
            on_choice=lambda text: None if output.quiet else bar.write(text, file=sys.stderr),
        )
    errors = list(repeats.failures.values())
    if repeats.rejected and len(set(map(str, errors))) == 1:
        raise errors[0]  # of the command, not of a run
    for name, error in repeats.failures.items():
        echo(visible(f"failed: {name}: {error}"), err=True)
    if repeats.rejected:
        return BAD_USAGE
    output.result(repeats.document, lambda: repeats_summary(repeats))
    return 0 if not repeats.failures else SOME_FAILED if repeats.scores else FAILED


def repeats_summary(repeats: "Repeats") -> str:
    """A row per run, and the mean and deviation over the runs."""
    names = ("valence", "arousal", "mean")
    rows = [(run, *(number(s[k]) for k in names)) for run, s in repeats.scores.items()]
    moments = repeats.document()["ccc"]
    for part in ("mean", "std"):
        values = [moments.get(k, {}).get(part) for k in names]
        rows.append((part, *map(number, values)))
    return table(rows, ("CCC", *names))


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
    run: RunPath,
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
    if width is not None and smooth in (None, "none"):
        raise UsageError(explain("--smooth-seconds requires --smooth mean or savgol", got=smooth_seconds))
    if str(run).startswith("onnx:"):
        if without or groups:
            raise UsageError(explain("--without and --groups require a run", got=run))
        metrics = _evaluate_model(str(run), cache, split or "val", va, smooth, width, allow_missing)
        print_metrics(metrics, output)
        return 0
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.evaluate import choose_smoothing, evaluate_run
        from vaflow.train.folds import read_groups, warn_unknown
        from vaflow.train.run_folder import cache_of

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
    from vaflow.external_models import Columns, evaluate_model
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
    run: RunPath,
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
        from vaflow.train.evaluate import choose_smoothing, store_smoothing
        from vaflow.train.run_folder import cache_of

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
    scores = {"CCC": "ccc", "CCC within videos": "within_video_ccc", "Pearson": "pearson", "RMSE": "rmse"}
    rows = [(label, *(number(metrics[key][name], ".4f") for name in names)) for label, key in scores.items()]
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
    for name, extra in metrics.get("extra", {}).items():
        f1 = [(label, number(value, ".4f")) for label, value in extra["f1"].items()]
        rows = [*f1, ("mean", number(extra["macro_f1"], ".4f"))]
        text += f"\n\n{name}, {extra['n_frames']} labelled frames\n\n{table(rows, (extra['task'], 'F1'))}"
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
