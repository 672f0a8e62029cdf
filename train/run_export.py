"""Export of runs: a folder in the layout of the Hugging Face hub, and the heads as ONNX.

DIR/config.json          the run's `config.toml` as JSON, without paths of the machine; names the other files
    model.safetensors    as in the run, with model-valence and model-arousal where it has them
    README.md            model card
    metrics.json, smoothing.json, uncertainty.json, training_features.safetensors, encoders/   as in the run

The folder, or its copy on the hub, can be used in place of a run (see `PretrainedModel`).

Inputs of the ONNX model: `inside` [B, F] bool and `time` [B, F] of the output frames; per stream NAME `NAME.features`
and `NAME.valid`, and of audio streams also `NAME.inside` and `NAME.time`; see `Batch`. Outputs: `va` [B, F, 2],
`region_logits` [B, F, 9] with a prompt head, `logits.TARGET` per further target, and `std` [B, F, 2], calibrated
standard deviations, with a variance head. Smoothing and the marks of frames far from training are not part of it.
"""

import copy
import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

from vaflow.errors import CorruptError, UsageError, WeightsError, command, count, explain, visible
from vaflow.files import write_file
from vaflow.train.batch import AUDIO, VISUAL, Batch, StreamSpec
from vaflow.train.heads import VAModel
from vaflow.train.metrics import DIMENSIONS, SCORES
from vaflow.train.run_folder import (
    CONTEXT,
    PROTOTYPES,
    PUBLISHED_CONFIG,
    RunFolder,
    load_run,
    model_options,
    named_files,
    require_record,
)
from vaflow.train.run_record import RunRecord
from vaflow.train.smoothing import FILE as SMOOTHING
from vaflow.train.uncertainty import CALIBRATION, TRAINING_FEATURES

OPSET = 17
PARTS = {VISUAL: ("features", "valid"), AUDIO: ("features", "valid", "inside", "time")}  # inputs per stream
ONNX = ("heads.onnx", "heads-fixed.onnx")
FRAME_INTERVAL = 0.1  # seconds, of the example that is traced
MAX_WIDTH = 2**16  # maximum width of a prototype; larger values are not text embeddings


def export_run(run: Path, out: Path) -> list[Path]:
    """Write a finished run as a folder to share; returns its files.

    Raises:
        UsageError: `run` is not a finished run, or `out` holds other files.
        CorruptError: a file of the run is damaged.
    """
    record, folder = require_record(run), RunFolder(run)
    model = load_run(run).model
    if not folder.metrics_file.is_file():
        remedy = f"Resume it: {command('train', record.cache, '--out', run, '--config', folder.config_file)}"
        raise UsageError(explain(f"The run {run} was interrupted before it finished", remedy=remedy))
    earlier = _earlier_files(out)
    files = [folder.weights_file, folder.metrics_file, *folder.encoders.glob("**/*")]
    files += [folder.path / name for name in (SMOOTHING, CALIBRATION, TRAINING_FEATURES)]
    if record.config.best == "each":
        files += [folder.each_file(name) for name in DIMENSIONS]
    named = {path.relative_to(folder.path).as_posix(): path for path in files if path.is_file()}
    groups = Path(record.config.fold_groups).name
    settings = replace(record.config, init="", text_weights="", fold_groups=groups)
    shared = replace(record, cache="", cache_relative="", groups_relative="", config=settings)
    config = shared.document() | {"files": sorted(named)}
    weights = model.state_dict()
    config |= {
        key: list(weights[name].shape)
        for key, name in (("prototypes", PROTOTYPES), ("context", CONTEXT))
        if name in weights
    }
    for name in earlier - named.keys():
        (out / name).unlink(missing_ok=True)
    for name, path in named.items():
        write_file(out / name, path.read_bytes())
    write_file(out / PUBLISHED_CONFIG, json.dumps(config, indent=2) + "\n")
    write_file(out / "README.md", model_card(folder.path.resolve().name, shared, folder.read_metrics()))
    return [out / name for name in (*named, PUBLISHED_CONFIG, "README.md")]


def _earlier_files(out: Path) -> set[str]:
    """Names of the files that an earlier export wrote into a folder; empty for a new or empty folder.

    Raises:
        UsageError: the folder holds other files.
    """
    try:
        if (out / PUBLISHED_CONFIG).is_file():
            return {*named_files(out / PUBLISHED_CONFIG), *ONNX}
    except CorruptError:
        pass
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(explain(f"{out} is not empty", expected="a new or empty folder, or that of an earlier export"))
    return set()


def model_card(name: str, record: RunRecord, metrics: Mapping[str, Any]) -> str:
    """The text of README.md: facts of the run, its scores, and what its author must add."""
    config = record.config
    lines = ["---", "library_name: vaflow", "tags:", "- valence-arousal", "- affective-computing", "---", ""]
    lines += [f"# {_plain(name)}", ""]
    lines += [f"Valence and arousal per video frame, trained with vaflow {record.version}.", ""]
    lines += ["```bash", "vaflow predict DIR video.mp4 --out predictions", "```", ""]
    lines += ["`DIR` is this folder, or `hf:USER/NAME` on the Hugging Face hub. Weights are safetensors.", ""]
    lines += ["## Model", ""]
    lines += [f"- Temporal model {config.temporal}, fusion {config.fusion}, hidden size {config.hidden}"]
    for stream in record.head_streams:
        digest = str(stream.identity.get("weights", "none"))
        lines += [f"- {stream.kind} stream `{_plain(stream.name)}`, {stream.dim} dimensions, weights {_plain(digest)}"]
    for target in record.targets:
        lines += [f"- Further target: {_plain(target.name)} ({', '.join(map(_plain, target.names))})"]
    named, default = ("visual", "audio", "text", "init", "text_weights", "device"), type(config)().as_dict()
    changed = {key: value for key, value in config.as_dict().items() if value != default.get(key) and key not in named}
    settings = ", ".join(f"{key} = {value}" for key, value in changed.items())
    lines += [f"- Settings that differ from the defaults: {_plain(settings) or 'none'}", "", "## Training data", ""]
    for split, counts in record.data.items():
        clips = count(counts.get("clips", 0), "clip")
        lines += [f"- Split {_plain(split)}: {clips}, {count(counts.get('labelled_frames', 0), 'labelled frame')}"]
    lines += [
        "- To add: data set, version, number of people; age, gender, language, recording conditions; how it was rated"
    ]
    lines += ["", "## Results", ""]
    if isinstance(metrics.get("ccc"), Mapping):
        videos = count(metrics.get("n_videos", 0), "video")
        split = _plain(str(metrics.get("split")))
        lines += [f"Split {split}, {videos}, {count(metrics.get('n_frames', 0), 'frame')}.", ""]
        lines += ["| | CCC | 95 % interval | RMSE |", "|---|---|---|---|"]
        for row in SCORES:
            interval = (metrics.get("ci95") or {}).get(row)
            between = "-" if interval is None else " to ".join(map(_number, interval))
            scores = (_number((metrics.get(key) or {}).get(row)) for key in ("ccc", "rmse"))
            lines += ["| {0} | {1} | {3} | {2} |".format(row, *scores, between)]
    lines += ["", "## Limits", "", "- Estimates what annotators saw and heard, not what a person feels"]
    lines += ["- Not for decisions about people, and not for monitoring at work or school"]
    lines += [
        "- To add: licences of the model, of the encoders' weights and of the training data; intended use; contact"
    ]
    return "\n".join(lines) + "\n"


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _plain(text: str) -> str:
    """A name in Markdown: no line breaks, no markup."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", visible(text))


class Heads(nn.Module):
    """A model with tensors as arguments and results, in the order of `input_names` and `output_names`.

    Args:
        model: names the streams and outputs.
        predictor: what predicts, if it is not `model`.
        scale: [2], calibration of the standard deviations; None: 1.
    """

    scale: Tensor

    def __init__(self, model: VAModel, predictor: nn.Module | None = None, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2) if scale is None else scale.float())
        self.model = copy.deepcopy(predictor or model)
        for child in self.model.modules():
            if isinstance(child, nn.MultiheadAttention):
                child.__class__ = PlainAttention
        self.streams = model.streams
        self.output_names = ["va", *(["region_logits"] if model.prompt is not None else [])]
        self.output_names += [f"logits.{target.name}" for target in model.targets]
        self.output_names += [] if model.variance is None else ["std"]

    @property
    def input_names(self) -> list[str]:
        """Names of the arguments of `forward`."""
        return ["inside", "time", *(f"{s.name}.{part}" for s in self.streams for part in PARTS[s.kind])]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors named by `input_names` -> tensors named by `output_names`."""
        given = dict(zip(self.input_names, inputs, strict=True))
        inside, time = given["inside"], given["time"]
        batch = Batch(
            features={s.name: given[f"{s.name}.features"] for s in self.streams},
            valid={s.name: given[f"{s.name}.valid"] for s in self.streams},
            feature_inside={s.name: given.get(f"{s.name}.inside", inside) for s in self.streams},
            feature_time={s.name: given.get(f"{s.name}.time", time) for s in self.streams},
            inside=inside,
            time=time,
            target=time.new_zeros(1),
            labelled=inside,
            window=time.new_zeros(1),
        )
        output = self.model(batch)
        regions = [] if output.region_logits is None else [output.region_logits]
        std = [] if output.log_std is None else [self.scale * output.log_std.exp()]
        return (output.va, *regions, *output.extra.values(), *std)


class PlainAttention(nn.MultiheadAttention):
    """Attention (batch first, no dropout) in operators whose export keeps every length free."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **options: object
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention` without weights: [B, F, H], [B, S, H], [B, S, H], mask [B, S] -> [B, F, H]."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, None]
            scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        result = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(query.shape)
        return self.out_proj(result), None


def export_onnx(run: Path, out: Path) -> list[Path]:
    """Write `heads.onnx`, for windows of any length, and `heads-fixed.onnx`, for the run's window; both for any batch.

    Raises:
        UsageError: the package onnx is not installed, or `run` is not a finished run.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        remedy = "From a clone: pip install -e '.[onnx]'"
        raise UsageError(explain("--onnx requires the package onnx", got=error, remedy=remedy)) from error
    loaded = load_run(run)
    scale = None if loaded.calibration is None else torch.from_numpy(loaded.calibration.factors)
    heads = Heads(loaded.model, loaded.predictor, scale).eval()
    steps = {stream.name: stream.steps * max(1, stream.frames_per_step) for stream in loaded.record.streams}
    inputs = _example(heads.streams, loaded.record.config.frames or 1, steps)
    files = []
    for name, dynamic in zip(ONNX, (True, False), strict=True):
        write_file(out / name, onnx_bytes(heads, inputs, dynamic=dynamic))
        files.append(out / name)
    return files


def onnx_bytes(heads: Heads, inputs: dict[str, Tensor], *, dynamic: bool) -> bytes:
    """Trace the heads with example inputs; with `dynamic`, times are axes of any length."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in (*heads.input_names, *heads.output_names)}
    kinds = {s.name: s.kind for s in heads.streams}
    for name in axes if dynamic else ():
        stream = name.rpartition(".")[0]
        axes[name][1] = f"steps of {stream}" if kinds.get(stream, VISUAL) != VISUAL else "frames"
    file = io.BytesIO()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused Transformer layers have no ONNX form
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # warnings about shape checks and the age of the exporter
            torch.onnx.export(
                heads,
                tuple(inputs[name] for name in heads.input_names),
                file,  # takes any binary file
                input_names=heads.input_names,
                output_names=heads.output_names,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,  # the newer exporter unrolls recurrences over a fixed number of steps
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return file.getvalue()


def _example(streams: tuple[StreamSpec, ...], frames: int, steps: dict[str, int]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = {"inside": torch.ones(2, frames, dtype=torch.bool)}
    inputs["time"] = (torch.arange(frames) * FRAME_INTERVAL).expand(2, frames).contiguous()
    for stream in streams:
        size = frames if stream.kind == VISUAL else steps[stream.name]
        inputs[f"{stream.name}.features"] = torch.randn(2, size, stream.dim, generator=draw)
        inputs[f"{stream.name}.valid"] = torch.ones(2, size, dtype=torch.bool)
        inputs[f"{stream.name}.inside"] = torch.ones(2, size, dtype=torch.bool)
        inputs[f"{stream.name}.time"] = (torch.arange(size) * FRAME_INTERVAL).expand(2, size).contiguous()
    return inputs


class PretrainedModel(VAModel, PyTorchModelHubMixin, library_name="vaflow"):
    """`VAModel` from the `config.json` of an exported run, with `from_pretrained`, `save_pretrained`, `push_to_hub`.

        model = PretrainedModel.from_pretrained("DIR or USER/NAME")
        output = model(batch)  # vaflow.train.batch.Batch -> Output

    With `best = "each"` this is the best epoch of the mean CCC; `vaflow.load` also reads the best epochs per dimension.

    Args:
        config: content of `config.json`.

    Raises:
        CorruptError: `config` is not that of an exported run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        try:
            record = RunRecord.from_document(config)
            prototypes, context = config.get("prototypes"), config.get("context")
            shapes = [shape for shape in (prototypes, context) if shape is not None]
            if any(len(shape) != 2 or not all(0 < int(size) <= MAX_WIDTH for size in shape) for shape in shapes):
                raise ValueError("prototypes and context must be two sizes each")
        except (ValueError, TypeError) as error:
            raise CorruptError(explain("config.json is not that of an exported run", got=error)) from error
        super().__init__(
            [stream.spec for stream in record.streams],
            None if prototypes is None else torch.zeros(*prototypes),
            context=None if context is None else (context[0], context[1]),
            targets=record.targets,
            **model_options(record.config),
        )

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load every tensor, regardless of `strict`: the hub's default leaves missing tensors random."""
        if not Path(model_file).is_file():
            raise WeightsError(explain(f"{Path(model_file).parent} is incomplete", expected="model.safetensors"))
        return super()._load_as_safetensor(model, model_file, map_location, True)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> NoReturn:
        problem = "The model has no safetensors file"
        raise WeightsError(explain(problem, expected="model.safetensors", got=Path(model_file).name))
