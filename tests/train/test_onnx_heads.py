"""ONNX Runtime equals PyTorch on masked windows of the traced and of other lengths."""

from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from toy_batches import AUDIO_STREAM, AUDIO_STREAM_2, PROTOTYPES, VISUAL_STREAM, VISUAL_STREAM_2, toy_batch

from vaflow.train.batch import AUDIO, Batch, StreamSpec, TargetSpec
from vaflow.train.heads import EachModel, VAModel
from vaflow.train.heads.fusion import FUSION
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.run_export import Heads, onnx_bytes

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

TOLERANCE = 1e-5
SPECTROGRAM = StreamSpec("logmel", AUDIO, 16, frames_per_step=4)


def batch_of(streams: tuple[StreamSpec, ...], frames: tuple[int, ...], steps: tuple[int, ...], seed: int) -> Batch:
    batch = toy_batch(frames, steps, streams, seed=seed)

    def single(tensors: Any) -> Any:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    return replace(
        batch, features=single(batch.features), feature_time=single(batch.feature_time), time=batch.time.float()
    )


def inputs_of(batch: Batch, heads: Heads) -> dict[str, torch.Tensor]:
    tables = {"features": batch.features, "valid": batch.valid}
    tables |= {"inside": batch.feature_inside, "time": batch.feature_time}
    inputs = {"inside": batch.inside, "time": batch.time}
    for name in heads.input_names[2:]:
        stream, _, part = name.rpartition(".")
        inputs[name] = tables[part][stream]
    return inputs


def assert_same_outputs(model: VAModel, predictor: torch.nn.Module | None = None, factor: int = 1) -> None:
    """Export with one batch; compare with other masks and, for dynamic exports, other lengths."""
    streams = model.streams
    heads = Heads(model, predictor).eval()
    traced = inputs_of(batch_of(streams, (6, 6), (8 * factor, 8 * factor), 0), heads)
    same = batch_of(streams, (6, 4, 1), (8 * factor, 5, 1), 1)
    other = batch_of(streams, (11, 3, 7, 1), (12 * factor, 2, 12 * factor, 9), 2)
    silent = replace(other, valid={name: torch.zeros_like(mask) for name, mask in other.valid.items()})
    for dynamic, batches in ((True, (same, other, silent)), (False, (same,))):
        session = onnxruntime.InferenceSession(onnx_bytes(heads, traced, dynamic=dynamic))
        read = {one.name for one in session.get_inputs()}
        for batch in batches:
            inputs = inputs_of(batch, heads)
            got = session.run(heads.output_names, {name: x.numpy() for name, x in inputs.items() if name in read})
            with torch.inference_mode():
                output = (predictor or model)(batch)
            regions = [] if output.region_logits is None else [output.region_logits]
            std = [] if output.log_std is None else [heads.scale * output.log_std.exp()]
            expected = (output.va, *regions, *output.extra.values(), *std)
            for name, one, two in zip(heads.output_names, got, expected, strict=True):
                tolerance = TOLERANCE * max(1.0, float(two.abs().max()))
                np.testing.assert_allclose(one, two.numpy(), atol=tolerance, rtol=0, err_msg=f"{name}, {dynamic}")


def model_of(streams: tuple[StreamSpec, ...], **options: Any) -> VAModel:
    torch.manual_seed(3)
    return VAModel(streams, PROTOTYPES, hidden=16, **options).eval()


PAIRS = list(zip(FUSION, cycle(TEMPORAL), strict=False))
QUICK = ("attention", "hierarchical")  # with all operators of the others; an export takes half a second


@pytest.mark.parametrize(
    ("fusion", "temporal"),
    [pair if pair[0] in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_every_fusion_and_temporal_model_exports_to_onnx(fusion: str, temporal: str) -> None:
    assert len(FUSION) >= len(TEMPORAL)
    streams = (VISUAL_STREAM, VISUAL_STREAM_2, AUDIO_STREAM, AUDIO_STREAM_2)
    positions = {"attention_positions": "time"} if "attention" in fusion or fusion == "hierarchical" else {}
    assert_same_outputs(
        model_of(streams, fusion=fusion, temporal=temporal, temporal_options={"layers": 2}, **positions)
    )


@pytest.mark.parametrize("stream", [VISUAL_STREAM, AUDIO_STREAM])
def test_one_modality_is_supported(stream: StreamSpec) -> None:
    assert_same_outputs(model_of((stream,), normalize="l2"))


def test_a_spectrogram_stream_exports_to_onnx() -> None:
    assert_same_outputs(model_of((VISUAL_STREAM, SPECTROGRAM)), factor=4)


def test_extra_targets_and_two_best_epochs_export_to_onnx() -> None:
    targets = (TargetSpec("expression", "classes", ("neutral", "joy", "anger")),)
    model, other = (model_of((VISUAL_STREAM, AUDIO_STREAM), targets=targets) for _ in range(2))
    torch.nn.init.normal_(other.regression[0].weight)  # type: ignore[arg-type]
    assert_same_outputs(model, EachModel(model, other))


def test_standard_deviations_export_to_onnx() -> None:
    model = model_of((VISUAL_STREAM, AUDIO_STREAM), variance=True)
    assert Heads(model).output_names == ["va", "region_logits", "std"]
    assert_same_outputs(model)
