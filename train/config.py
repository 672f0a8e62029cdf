"""Settings of a training run: one frozen dataclass, checked once, stored in the run as `config.toml`.

Values come from four places, each overriding the one before: a preset, a TOML file, command-line options, and
`--set KEY=VALUE`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from vaflow import settings
from vaflow.errors import UsageError, explain
from vaflow.settings import NONE, setting

if TYPE_CHECKING:
    from vaflow.timeline import Grid

TEXT_SUFFIX = ".text"  # stream of prompt prototypes = visual stream + suffix
TEMPORAL = ("gru", "tcn", "lstm", "transformer")
FUSION = ("hierarchical", "attention", "gated", "concat", "attention-concat")
NORMALIZE = ("layer", "l2", "standard", "none")
AUTO = -1  # of epochs
POSITIONS = ("none", "time")
UNCERTAINTY = ("none", "variance")
P1 = "arXiv 2603.13415"
MIN_WINDOW, MIN_STRIDE = 0.1, 0.01  # seconds, as in extraction; smaller ones make millions of windows
MAX_WINDOW = 24 * 3600.0  # seconds; maximum duration of a clip
MAX_SAMPLES = 100_000  # per window
# Settings added since the first version, with the value that trains as that version did. Runs without them are read
# with these values, and `ablate` hashes them only where they differ, so that runs of older studies are reused.
BEFORE_SETTING: Mapping[str, Any] = {
    "attention_positions": "none",
    "deterministic": False,
    "fold_groups": "",
    "patience": 400,
    "shared_sources": False,
    "uncertainty": NONE,
    "nll_weight": 0.0,
    "min_face_quality": 0.0,
    "speech_mask": False,
}
# Omitted from records at their default, so that digests of older runs do not change.
LEFT_OUT = ("uncertainty", "nll_weight", "min_face_quality", "speech_mask")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; each field carries its description (see `vaflow.settings`).

    Raises:
        UsageError: a value is not one of the choices, out of range, or does not go with another.
    """

    # fmt: off
    visual: tuple[str, ...] = setting((), "Visual streams, or none",
        group="data", unset="the cache's only one", option="--visual", shown=True)
    audio: tuple[str, ...] = setting((), "Audio streams, or none",
        group="data", unset="the cache's only one", option="--audio", shown=True)
    text: str = setting("", "Stream of prompt prototypes",
        group="data", unset="that of the first visual stream", metavar="STREAM")
    prompts: str = setting("default", "Prompt set: an item of the stream of prototypes", group="data")
    window: float | None = setting(None, "Length of a training window",
        group="data", unit="seconds", at_least=MIN_WINDOW, below=MAX_WINDOW, unset="as in the cache", option="--window")
    stride: float | None = setting(None, "Time between the starts of two windows",
        group="data", unit="seconds", at_least=MIN_STRIDE, below=MAX_WINDOW, unset="as in the cache", option="--stride")
    frames: int | None = setting(None, "Output frames per window",
        group="data", above=0, below=MAX_SAMPLES, unset="as in the cache", option="--frames")
    audio_steps: int | None = setting(None, "Audio steps per window",
        group="data", above=0, below=MAX_SAMPLES, unset="at the rate of the stream")
    label_reduction: str = setting("nearest", "Label of a sampled frame: the nearest, or the mean over a step",
        group="data", choices=("nearest", "mean"))
    hidden: int = setting(256, "Width of the projections, the temporal models and the fusion",
        group="model", at_least=1, source=P1)
    temporal: str = setting("gru", "Temporal model",
        group="model", choices=TEMPORAL, source=P1, option="--temporal", shown=True)
    fusion: str = setting("hierarchical", "Fusion of the modalities",
        group="model", choices=FUSION, source=f"{P1}, equations 3 to 5", option="--fusion", shown=True)
    attention_heads: int = setting(4, "Heads of the cross-modal attention", group="model", at_least=1)
    attention_positions: str = setting("time",
        "Positions in the cross-modal attention: none as published, or sinusoids of the true times",
        group="model", choices=POSITIONS, source="Choices where the papers are silent")
    dropout: float = setting(0.1, "Dropout probability", group="model", at_least=0, below=1)
    normalize: str = setting("standard", "Normalization of the input features", group="model", choices=NORMALIZE)
    layers: int = setting(0, "Layers of the temporal model",
        group="model", at_least=0, unset="1 for gru and lstm, 3 for tcn, 2 for transformer")
    causal: bool = setting(True, "TCN without access to later frames", group="model")
    learnable_prompts: bool = setting(False, "Train the prompt prototypes", group="model")
    prompt_context: int = setting(0,
        "Learned vectors before each region's description, in place of the templates (0: cached prototypes)",
        group="model", at_least=0)
    text_weights: str = setting("", "Weights file of the text tower, for prompt_context",
        group="model", unset="from the hub", metavar="FILE")
    centers: float = setting(0.66, "Distance of outer region centers from 0",
        group="loss", above=0, source=f"{P1}, equation 2", option="--centers")
    sigma: float = setting(0.45, "Width of the soft labels",
        group="loss", above=0, source=f"{P1}, equation 2", option="--sigma")
    region_labels: str = setting("soft", "Region labels: soft, or one-hot of the nearest center",
        group="loss", choices=("soft", "hard"))
    kl_weight: float = setting(0.2, "Weight of the prompt loss (0: no prompt head)",
        group="loss", at_least=0, source=f"{P1}, equation 6", option="--kl-weight")
    mse_weight: float = setting(0.0, "Weight of the mean squared error", group="loss", at_least=0)
    ccc_weight: float = setting(1.0, "Weight of the CCC loss", group="loss", at_least=0, source=f"{P1}, equation 6")
    extra_targets: tuple[str, ...] = setting((), "Streams of further targets (expression classes, action units)",
        group="loss", unset="none")
    extra_weight: float = setting(0.5, "Weight of each further target's cross-entropy", group="loss", at_least=0)
    uncertainty: str = setting("none",
        "Standard deviation of every prediction: none, or a variance head trained with a Gaussian likelihood",
        group="loss", choices=UNCERTAINTY, source="A variance head beside the CCC")
    nll_weight: float = setting(0.0,
        "Weight of the Gaussian likelihood in the predictions themselves (0: they are trained as without it)",
        group="loss", at_least=0, source="A variance head beside the CCC")
    min_face_quality: float = setting(0.0,
        "Treat faces below this quality (0 to 1; size, sharpness, yaw and detector score) as missing",
        group="data", at_least=0, below=1)
    speech_mask: bool = setting(False, "Treat audio without speech as missing", group="data")
    modality_dropout: float = setting(0.0, "Probability that a training window loses one modality",
        group="data", at_least=0, below=1)
    best: str = setting("mean",
        "Epoch whose weights are kept: best mean CCC, also the best of each dimension, or best CCC within videos",
        group="optimization", choices=("mean", "each", "within"))
    epochs: int = setting(15,
        "Passes over the training windows; auto: until the validation score stops rising (see patience)",
        group="optimization", at_least=1, words={"auto": AUTO}, source=P1, option="--epochs", shown=True)
    patience: int = setting(400,
        "With epochs=auto: steps without a better validation score (at least 3 epochs) after which training stops",
        group="optimization", at_least=1)
    batch_size: int = setting(16, "Windows per step",
        group="optimization", at_least=1, source=P1, option="--batch-size")
    lr: float = setting(1e-4, "Learning rate of the heads (AdamW)",
        group="optimization", above=0, source=P1, option="--lr", shown=True)
    weight_decay: float = setting(1e-4, "Weight decay (AdamW)",
        group="optimization", at_least=0, source=P1, option="--weight-decay")
    schedule: str = setting("constant", "Learning rate schedule over the whole run",
        group="optimization", choices=("constant", "cosine"))
    warmup: float = setting(0.0, "Epochs in which the learning rate rises linearly from 0",
        group="optimization", at_least=0)
    clip_norm: float = setting(0.0, "Largest norm of the gradient (0: no limit)", group="optimization", at_least=0)
    seed: int = setting(0, "Random seed (initialization, shuffling, dropout)",
        group="optimization", at_least=0, option="--seed", shown=True)
    deterministic: bool = setting(False,
        "Deterministic GPU algorithms: equal results at every start on one GPU model, slower",
        group="optimization")
    device: str = setting("auto", "Device: auto, cpu or cuda[:N]",
        group="optimization", pattern=r"auto|cpu|cuda(:\d+)?", form="auto, cpu or cuda[:N]", metavar="DEVICE",
        option="--device", shown=True)
    train_split: str = setting("train", "Split to train on", group="data", metavar="SPLIT")
    val_split: str = setting("val", "Split to validate on", group="data", metavar="SPLIT")
    shared_sources: bool = setting(False, "Allow clips of the same recording in the training and the validation split",
        group="data")
    folds: int = setting(0, "Folds of a cross-validation, divided by source video (see `vaflow folds`)",
        group="data", at_least=0, unset="no folds", option="--folds", metavar="K")
    fold: int = setting(1, "Fold to validate on, from 1; the others are trained on",
        group="data", option="--fold", metavar="I")
    fold_groups: str = setting("", "Column of a groups file whose groups stay in one fold, as groups.csv:speaker",
        group="data", unset="source video", option="--fold-groups", metavar="FILE:COLUMN")
    fold_splits: tuple[str, ...] = setting(("train", "val"), "Splits that the folds divide",
        group="data", metavar="SPLITS")
    finetune: bool = setting(False, "Train CLIP and AST as well, from the cached pixels and log-Mel",
        group="optimization", option="--finetune", shown=True)
    backbone_lr: float = setting(3e-6, "Learning rate of the encoders",
        group="fine-tuning", above=0, source=P1, option="--backbone-lr")
    finetune_blocks: int | None = setting(None, "Last blocks of each encoder to train (0: none)",
        group="fine-tuning", at_least=0, unset="all")
    accumulate: int = setting(1, "Parts in which a batch passes the encoders; more save memory, same result",
        group="fine-tuning", at_least=1)
    augment: bool = setting(True, "Flip, crop, color and SpecAugment in training", group="fine-tuning")
    checkpointing: bool = setting(False, "Recompute activations in the backward pass (less memory, more time)",
        group="fine-tuning")
    precision: str = setting("auto", "Precision of the encoders (auto: bfloat16 on CUDA, else float32)",
        group="fine-tuning", choices=("auto", "float32", "bfloat16"))
    init: str = setting("", "Run whose heads are the initial weights",
        group="fine-tuning", unset="random weights", metavar="RUN")
    # fmt: on

    def __post_init__(self) -> None:
        settings.check(self)
        for kind in ("visual", "audio"):
            names = getattr(self, kind)
            if NONE in names and len(names) > 1:
                raise UsageError(explain(f"--{kind} none excludes other {kind} streams", got=", ".join(names)))
            if len(set(names)) < len(names):
                raise UsageError(explain(f"--{kind} names a stream twice", got=", ".join(names)))
        if self.visual == self.audio == (NONE,):
            raise UsageError(explain("--visual none and --audio none leave nothing to train on"))
        if self.folds == 1:
            raise UsageError(explain("--folds must be >= 2, or 0 for no folds (got 1)"))
        if self.folds and not 1 <= self.fold <= self.folds:
            raise UsageError(explain(f"--fold must be between 1 and --folds {self.folds} (got {self.fold})"))
        if self.folds and not self.fold_splits:
            raise UsageError(explain("fold_splits must name at least one split"))
        if not self.ccc_weight and not self.mse_weight:
            raise UsageError(explain("ccc_weight and mse_weight are both 0", expected="one of them above 0"))
        if self.nll_weight and self.uncertainty == NONE:
            problem = "nll_weight requires a variance head"
            raise UsageError(explain(problem, expected="--set uncertainty=variance", got=NONE))
        if self.prompt_context and self.learnable_prompts:
            raise UsageError(explain("prompt_context and learnable_prompts exclude each other", got="both"))
        if self.prompt_context and not self.kl_weight:
            raise UsageError(explain("prompt_context requires the prompt loss", expected="--kl-weight above 0", got=0))
        if self.init and not self.finetune:
            raise UsageError(explain("init requires --finetune", got=f"init={self.init}"))
        if self.finetune and self.best == "each":
            raise UsageError(explain("best=each is not supported with --finetune", expected="best=mean or best=within"))
        if self.epochs == AUTO and self.schedule != "constant":
            raise UsageError(explain(f"schedule={self.schedule} requires a number of --epochs", got="--epochs auto"))
        if None not in (self.window, self.stride, self.frames):
            _ = self.grid  # raises on values that do not go together

    @property
    def grid(self) -> "Grid":
        """The training windows.

        Raises:
            UsageError: window, stride or frames is not set, or they do not go together.
        """
        from vaflow.timeline import Grid  # NumPy: the command line builds its options from this class

        if self.window is None or self.stride is None or self.frames is None:
            raise UsageError(explain("window, stride and frames must be set to divide clips into windows"))
        return Grid(self.window, self.stride, self.frames)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for TOML and JSON; settings that are None are left out, as are `LEFT_OUT` at their default."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        plain["epochs"] = "auto" if self.epochs == AUTO else self.epochs
        default = {item.name: item.default for item in fields(self)}
        left_out = {key for key in LEFT_OUT if plain[key] == default[key]}
        return {key: value for key, value in plain.items() if value is not None and key not in left_out}


def coerce(key: str, value: Any) -> Any:
    """Convert `value` to the type of setting `key`.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    return settings.coerce(TrainConfig, key, value)


def merge(*layers: Mapping[str, Any]) -> TrainConfig:
    """Build a config from settings of several places, later ones first; values may be typed (TOML) or text.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: coerce(key, value) for key, value in layer.items()}
    return TrainConfig(**merged)


def with_aliases(config: TrainConfig, aliases: Mapping[str, str]) -> TrainConfig:
    """Return the settings with streams and their prototypes replaced by `aliases`; "none" removes a stream.

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
    if "vaflow" in document:  # a run's config.toml
        settings = {**BEFORE_SETTING, **settings}
    for key, value in settings.items():
        coerce(key, value)
    return settings


def to_toml(config: TrainConfig) -> str:
    """The settings as flat TOML; `from_toml` reads it back."""
    return tomli_w.dumps(config.as_dict())


def from_toml(text: str) -> TrainConfig:
    """Read the text of `to_toml`.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    return merge(tomllib.loads(text))
