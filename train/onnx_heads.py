"""Export the heads of a run as ONNX, for programs without PyTorch.

Inputs: `inside` [B, F] bool and `time` [B, F] of the output frames; per stream NAME `NAME.features` and `NAME.valid`,
and of audio streams also `NAME.inside` and `NAME.time`. Outputs: `va` [B, F, 2], `region_logits` [B, F, 9] with a
prompt head, `logits.TARGET` per further target, and `std` [B, F, 2], calibrated standard deviations, with a variance
head. Smoothing and the marks of frames far from training are not part of the model. `Batch` explains each input.
"""

import copy
import io
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.errors import UsageError, explain
from vaflow.files import write_file
from vaflow.train.batch import VISUAL, Batch, StreamSpec
from vaflow.train.heads.model import VAModel
from vaflow.train.runs import load_run

OPSET = 17
FRAME_INTERVAL = 0.1  # seconds, of the example that is traced


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
        return ["inside", "time", *(f"{s.name}.{part}" for s in self.streams for part in _parts(s))]

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


def _parts(stream: StreamSpec) -> tuple[str, ...]:
    return ("features", "valid") if stream.kind == VISUAL else ("features", "valid", "inside", "time")


def inputs_of(batch: Batch, streams: tuple[StreamSpec, ...]) -> dict[str, Tensor]:
    """The inputs of the ONNX model for a batch."""
    inputs = {"inside": batch.inside, "time": batch.time}
    tables = {
        "features": batch.features,
        "valid": batch.valid,
        "inside": batch.feature_inside,
        "time": batch.feature_time,
    }
    return inputs | {f"{s.name}.{part}": tables[part][s.name] for s in streams for part in _parts(s)}


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
    for name, dynamic in (("heads.onnx", True), ("heads-fixed.onnx", False)):
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
