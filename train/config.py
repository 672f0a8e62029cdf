"""What `vaflow train` can be asked for: one frozen record, checked once, stored beside the run.

Values come from four places, each winning over the one before: a preset, a TOML file, options of the command line,
and `--set KEY=VALUE`. Defaults are the full model of arXiv 2603.13415.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from vaflow.errors import UsageError, explain
from vaflow.timeline import Grid

NONE = "none"  # a stream option of this value turns the modality off
TEXT_SUFFIX = ".text"  # of the stream of prompt prototypes that belongs to a visual stream
TEMPORAL = ("gru", "tcn", "lstm", "transformer")
FUSION = ("hierarchical", "attention", "gated", "concat", "attention-concat")
NORMALIZE = ("layer", "l2", "standard", "none")
REGION_LABELS = ("soft", "hard")
LABEL_REDUCTIONS = ("nearest", "mean")
SCHEDULES = ("constant", "cosine")
BEST = ("mean", "each")
PRECISIONS = ("auto", "float32", "bfloat16")
PRESETS = ("p1", "p2")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        visual, audio: stream names; empty: the cache's own, ("none",): without that modality.
        text: the stream of prompt prototypes; empty: the one of the first visual stream.
        prompts: the prompt set, an item of that stream.
        window, stride: seconds; frames: samples per window. None: as the cache was extracted.
        audio_steps: audio steps per window, where windows are not the cache's. None: at the stream's own rate.
        label_reduction: labels at sampled times: of the "nearest" frame, or the "mean" over one step.
        hidden, temporal, fusion, attention_heads, dropout, normalize: of the model; see `vaflow.train.heads.model`.
        layers: of the temporal model; 0: its default. causal: whether the TCN sees only the past.
        learnable_prompts: train the prototypes, too.
        prompt_context: learned vectors in front of each description, in the place of the templates; 0: the cached
            prototypes. The encoder's text tower runs in training. text_weights: a local file for it.
        centers, sigma: of the nine regions and their soft labels (equation 2).
        region_labels: "soft" (equation 2) or "hard" (the nearest region alone).
        kl_weight: lambda of equation 6; 0 leaves the prompt head out. mse_weight: of a squared error beside it.
        ccc_weight: of the concordance itself, 1 in the paper; 0 needs a mse_weight.
        extra_targets: streams of further targets that a linear head each learns, as expression classes and action
            units; extra_weight: of each one's cross-entropy.
        modality_dropout: share of training windows in which one modality is marked missing, in a model of two.
        best: the weights that are kept: of the best "mean" CCC, or beside them those of the best of "each" dimension.
        epochs, batch_size, lr, weight_decay: of AdamW. schedule: of the learning rate, over the whole run.
        warmup: epochs in which the learning rate rises linearly from 0.
        clip_norm: largest gradient norm; 0: not clipped.
        seed: of the weights, the shuffling and dropout. device: "auto", "cpu" or "cuda[:N]".
        train_split, val_split: names of the splits.
        folds, fold: train on all but one of so many parts of `fold_splits`, and validate on part `fold`, counted from
            1; a source video is never divided. 0: the two splits as they are. See `vaflow.train.folds`.
        finetune: train CLIP and AST, too, from the cached pixels and log-Mel; the settings below are for that.
        backbone_lr: of their parameters; `lr` is of the heads.
        finetune_blocks: how many of the last blocks of each train, with what follows them; 0: none, None: everything.
        accumulate: in how many parts a batch goes through the backbones, to save memory; the result is the same.
        augment: change pictures and sound in training, as `vaflow.train.finetune.augment` says.
        checkpointing: compute the blocks' activations again for their gradients, to save memory.
        precision: of the backbones in training: "float32", "bfloat16", or "auto" (bfloat16 on CUDA).
        init: folder of a run on the same streams whose heads are the first weights; empty: fresh ones.

    Raises:
        UsageError: a value is of the wrong type, not one of the choices, or out of range.
    """

    visual: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    text: str = ""
    prompts: str = "default"
    window: float | None = None
    stride: float | None = None
    frames: int | None = None
    audio_steps: int | None = None
    label_reduction: str = "nearest"
    hidden: int = 256
    temporal: str = "gru"
    fusion: str = "hierarchical"
    attention_heads: int = 4
    dropout: float = 0.1
    normalize: str = "layer"
    layers: int = 0
    causal: bool = True
    learnable_prompts: bool = False
    prompt_context: int = 0
    text_weights: str = ""
    centers: float = 0.66
    sigma: float = 0.45
    region_labels: str = "soft"
    kl_weight: float = 0.2
    mse_weight: float = 0.0
    ccc_weight: float = 1.0
    extra_targets: tuple[str, ...] = ()
    extra_weight: float = 0.5
    modality_dropout: float = 0.0
    best: str = "mean"
    epochs: int = 15
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 1e-4
    schedule: str = "constant"
    warmup: float = 0.0
    clip_norm: float = 0.0
    seed: int = 0
    device: str = "auto"
    train_split: str = "train"
    val_split: str = "val"
    folds: int = 0
    fold: int = 1
    fold_splits: tuple[str, ...] = ("train", "val")
    finetune: bool = False
    backbone_lr: float = 3e-6
    finetune_blocks: int | None = None
    accumulate: int = 1
    augment: bool = True
    checkpointing: bool = False
    precision: str = "auto"
    init: str = ""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        _check_streams(self)
        _check_folds(self)
        if None not in (self.window, self.stride, self.frames):
            _ = self.grid  # raises on values that do not go together

    @property
    def grid(self) -> Grid:
        """The training windows, once all three of their settings are known.

        Raises:
            UsageError: they are not known yet, or do not go together.
        """
        if self.window is None or self.stride is None or self.frames is None:
            raise UsageError(explain("Training windows are not known yet", remedy="Set window, stride and frames"))
        return Grid(self.window, self.stride, self.frames)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for TOML and JSON; settings that are None are left out."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in plain.items() if value is not None}


def merge(*layers: Mapping[str, Any]) -> TrainConfig:
    """Settings of several places, later ones winning; values may be typed (TOML) or text (the command line).

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: coerce(key, value) for key, value in layer.items()}
    return TrainConfig(**merged)


def coerce(key: str, value: Any) -> Any:
    """`value` as the type of setting `key`: text is parsed, whole numbers become floats where those are wanted.

    Raises:
        UsageError: there is no such setting, or the value is not of its type.
    """
    types = get_type_hints(TrainConfig)
    if key not in types:
        raise UsageError(explain("Unknown setting", got=key, choices=types))
    kind = types[key]
    if isinstance(kind, UnionType):
        if value is None or value == NONE:
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        names = value.strip("[]").replace('"', "").split(",") if isinstance(value, str) else value
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return tuple(name.strip() for name in names if name.strip())
        raise _wrong_type(key, "stream names or split names, separated by commas", value)
    return _scalar(key, kind, value)


def _scalar(key: str, kind: type, value: Any) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is bool:
        words = {"true": True, "false": False}
        result = words.get(str(value).lower())
        if result is None:
            raise _wrong_type(key, "true or false", value)
        return result
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    raise _wrong_type(key, {int: "a whole number", float: "a number"}.get(kind, "text"), value)


def _wrong_type(key: str, expected: str, value: Any) -> UsageError:
    return UsageError(explain(f"Setting {key} does not understand its value", expected=expected, got=repr(value)))


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """["lr=3e-4", ...] -> {"lr": "3e-4", ...}; dashes in keys are underscores.

    Raises:
        UsageError: a setting is not KEY=VALUE, or its key is unknown.
    """
    result = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(explain("--set takes a key and a value", expected="KEY=VALUE, as lr=3e-4", got=setting))
        coerce(key, value.strip())
        result[key] = value.strip()
    return result


def with_aliases(config: TrainConfig, aliases: Mapping[str, str]) -> TrainConfig:
    """The same settings with other streams, and their prototypes, in the place of those named; "none" leaves one out.

    Raises:
        UsageError: a stream would be there twice, or none would be left.
    """

    def streams(names: tuple[str, ...]) -> tuple[str, ...]:
        others = tuple(aliases.get(name, name) for name in names)
        return tuple(name for name in others if name != NONE) or others[:1]

    text, suffix = config.text.removesuffix(TEXT_SUFFIX), TEXT_SUFFIX if config.text.endswith(TEXT_SUFFIX) else ""
    text = aliases.get(text, text)
    return replace(
        config,
        visual=streams(config.visual),
        audio=streams(config.audio),
        text="" if text == NONE else f"{text}{suffix}",
    )


def preset(name: str) -> dict[str, Any]:
    """Settings of a preset: "p1" (arXiv 2603.13415) or "p2" (arXiv 2503.10523).

    Raises:
        UsageError: there is no such preset.
    """
    presets = tomllib.loads(resources.files("vaflow.train").joinpath("presets.toml").read_text("utf-8"))
    if name not in presets:
        raise UsageError(explain("Unknown preset", got=name, choices=presets))
    return dict(presets[name])


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file: its keys, or those of its table `train`, as in a run's `config.toml`.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has unknown keys.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(explain(f"Cannot read the settings file {path}", got=error.strerror)) from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, brackets without end
        raise UsageError(explain(f"{path} is not TOML", expected="lines such as `lr = 3e-4`", got=error)) from error
    table = document.get("train", document)
    settings = dict(table) if isinstance(table, dict) else document
    for key, value in settings.items():
        coerce(key, value)
    return settings


def to_toml(config: TrainConfig) -> str:
    """The settings as flat TOML; `from_toml` reads it back."""
    return tomli_w.dumps(config.as_dict())


def from_toml(text: str) -> TrainConfig:
    """Read what `to_toml` wrote.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    return merge(tomllib.loads(text))


def differences(one: TrainConfig, other: TrainConfig, ignore: Iterable[str] = ("device",)) -> list[str]:
    """Every setting in which two configs differ, as text `key: this, not that`; empty when they would train the same.

    The device is left out by default: it changes speed and rounding, not what is trained.
    """
    names = [field.name for field in fields(TrainConfig) if field.name not in set(ignore)]
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return [f"{name}: {here!r}, not {there!r}" for name, here, there in pairs if here != there]


def _check_choices(config: TrainConfig) -> None:
    for name, choices in (
        ("temporal", TEMPORAL),
        ("fusion", FUSION),
        ("normalize", NORMALIZE),
        ("region_labels", REGION_LABELS),
        ("label_reduction", LABEL_REDUCTIONS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
        ("best", BEST),
    ):
        value = getattr(config, name)
        if value not in choices:
            raise UsageError(explain(f"Unknown value for {name}", got=value, choices=choices))


def _check_ranges(config: TrainConfig) -> None:
    for name in ("hidden", "attention_heads", "epochs", "batch_size", "accumulate"):
        _check(name, getattr(config, name) >= 1, "1 or more", getattr(config, name))
    for name in ("window", "stride", "frames", "audio_steps", "centers", "sigma", "lr", "backbone_lr"):
        value = getattr(config, name)
        _check(name, value is None or 0 < value < float("inf"), "a number above 0", value)
    for name in (
        *("kl_weight", "mse_weight", "ccc_weight", "weight_decay", "warmup", "clip_norm", "layers", "seed"),
        *("prompt_context", "folds", "extra_weight"),
    ):
        value = getattr(config, name)
        _check(name, 0 <= value < float("inf"), "a number, 0 or more", value)
    blocks = config.finetune_blocks
    _check("finetune_blocks", blocks is None or blocks >= 0, "a number of blocks, 0 or more, or none for all", blocks)
    _check("init", config.finetune or not config.init, "fine-tuning, for the heads of another run", config.init)
    for name in ("dropout", "modality_dropout"):
        value = getattr(config, name)
        _check(name, 0 <= value < 1, "a share of at least 0 and below 1", value)
    weights = config.ccc_weight + config.mse_weight
    _check("extra_targets", not (config.finetune and config.extra_targets), "none, in fine-tuning", "some")
    _check("best", config.best == "mean" or not config.finetune, "mean, in fine-tuning", config.best)
    _check("ccc_weight", weights > 0, "a weight above 0, or a mse_weight", config.ccc_weight)
    _check_prompts(config)
    kind, _, number = config.device.partition(":")
    known = config.device in ("auto", "cpu", "cuda") or (kind == "cuda" and number.isdigit())
    _check("device", known, "auto, cpu or cuda[:N]", config.device)


def _check_folds(config: TrainConfig) -> None:
    if not config.folds:
        return
    _check("folds", config.folds >= 2, "at least 2 parts, or 0 for the splits as they are", config.folds)
    _check("fold", 1 <= config.fold <= config.folds, f"a part from 1 to {config.folds}", config.fold)
    _check("fold_splits", bool(config.fold_splits), "the names of one split or more", config.fold_splits)


def _check_prompts(config: TrainConfig) -> None:
    if config.prompt_context and config.learnable_prompts:
        problem = "Either the prototypes are trained, or the context that they are made from"
        raise UsageError(explain(problem, expected="prompt_context or learnable_prompts", got="both"))
    if config.prompt_context and not config.kl_weight:
        problem = "Context vectors learn from the prompt loss alone"
        raise UsageError(explain(problem, expected="a kl_weight above 0", got=config.kl_weight))


def _check(name: str, fits: bool, expected: str, got: object) -> None:
    if not fits:
        raise UsageError(explain(f"{name} is out of range", expected=expected, got=got))


def _check_streams(config: TrainConfig) -> None:
    for name in ("visual", "audio"):
        names = getattr(config, name)
        if NONE in names and len(names) > 1:
            raise UsageError(
                explain(f"--{name} none stands alone", expected=f"either none or {name} streams", got=", ".join(names))
            )
        if len(set(names)) < len(names):
            raise UsageError(explain(f"A {name} stream is named twice", got=", ".join(names)))
    if config.visual == config.audio == (NONE,):
        raise UsageError(explain("Without a visual and without an audio stream there is nothing to train on"))
