"""VGGish: front end and network equal independent implementations; both key layouts load."""

from hashlib import sha256
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import signal

from vaflow.encoders import build_encoder, vggish
from vaflow.encoders.base import KALDI, cut
from vaflow.encoders.logmel import RATE
from vaflow.encoders.vggish import VGGISH_MEL, VGGish
from vaflow.errors import UsageError, WeightsError

SMALL_CHANNELS, SMALL_WIDTHS = ((2,), (3,), (4, 4), (5, 5)), (16, 12, 128)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (300 + 90 * time) * time) + 0.01 * rng.standard_normal(time.size)).astype("f4")


def restated_front_end(samples: np.ndarray) -> np.ndarray:
    """Reference front end: scipy's transform and a loop over bands; [F, 64]."""
    _, _, spectrum = signal.stft(
        samples.astype(float),
        fs=RATE,
        window=signal.get_window("hann", 400),  # periodic
        nperseg=400,
        noverlap=240,
        nfft=512,
        boundary=None,
        padded=False,
        detrend=False,
    )
    magnitude = np.abs(spectrum).T * signal.get_window("hann", 400).sum()  # scipy divides by the window's sum
    frequency = np.linspace(0, RATE / 2, 257)
    mel = 2595 * np.log10(1 + frequency / 700)  # HTK's other way to write the scale
    edges = np.linspace(2595 * np.log10(1 + 125 / 700), 2595 * np.log10(1 + 7500 / 700), 66)
    bands = []
    for band in range(64):
        shape = np.interp(mel, edges[band : band + 3], [0, 1, 0], left=0, right=0)
        bands.append(magnitude[:, 1:] @ shape[1:])
    return np.log(np.stack(bands, axis=1) + 0.01)


def test_the_front_end_equals_the_published_one() -> None:
    samples = noise(1.7)
    frames = VGGISH_MEL.open().push(samples)
    assert frames.shape == (1 + (samples.size - 400) // 160, 64) and frames.dtype == np.float32
    # scipy puts the 400 windowed samples at the start of 512, as the original does: magnitudes agree
    np.testing.assert_allclose(frames, restated_front_end(samples), atol=2e-4)


def test_one_frame_equals_the_definition_of_the_transform() -> None:
    samples = noise(0.05)
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    n, k = np.arange(400), np.arange(257)[:, None]
    magnitude = np.abs((np.exp(-2j * np.pi * k * n / 512) * (samples[160:560] * window)).sum(axis=1))
    slopes = np.log1p(k[:, 0] * RATE / 512 / 700)
    edges = np.linspace(np.log1p(125 / 700), np.log1p(7500 / 700), 66)
    expected = [np.log(0.01 + magnitude @ np.interp(slopes, edges[b : b + 3], [0, 1, 0], 0, 0)) for b in range(64)]
    np.testing.assert_allclose(VGGISH_MEL.open().push(samples)[1], expected, atol=1e-5)


def test_results_do_not_depend_on_the_block_size() -> None:
    samples = noise(3.3)
    whole = VGGISH_MEL.open().push(samples)
    for cuts in ([1, 399, 400, 7000], list(range(0, samples.size, 1000))):
        bank = VGGISH_MEL.open()
        np.testing.assert_array_equal(np.concatenate([bank.push(block) for block in np.split(samples, cuts)]), whole)


def test_clip_ends_are_padded_with_silence() -> None:
    silent = VGGISH_MEL.open().push(np.zeros(RATE, np.float32))
    np.testing.assert_array_equal(silent, np.full_like(silent, VGGISH_MEL.padding))


def naive_convolution(maps: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[C, T, M] with [O, C, 3, 3] -> [O, T, M]: one output number at a time."""
    out = np.zeros((weight.shape[0], *maps.shape[1:]))
    for o, t, m in np.ndindex(out.shape):
        total = bias[o]
        for dt, dm in np.ndindex(3, 3):
            if 0 <= t + dt - 1 < maps.shape[1] and 0 <= m + dm - 1 < maps.shape[2]:
                total += weight[o, :, dt, dm] @ maps[:, t + dt - 1, m + dm - 1]
        out[o, t, m] = max(total, 0)
    return out


def halved(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(maps.shape[0], maps.shape[1] // 2, 2, maps.shape[2] // 2, 2).max(axis=(2, 4))


def test_the_network_equals_a_reference_implementation() -> None:
    torch.manual_seed(0)
    network = VGGish(((2,), (2,), (2, 2), (3, 3)), (5, 4, 3)).double()
    weights = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    example = np.random.default_rng(0).normal(size=(96, 64))
    maps = example[None]
    for layers in ((0,), (3,), (6, 8), (11, 13)):
        for layer in layers:
            maps = naive_convolution(maps, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"])
        maps = halved(maps)
    assert maps.shape == (3, 6, 4)
    row = np.array([maps[c, t, m] for t in range(6) for m in range(4) for c in range(3)])  # TensorFlow's order
    for layer in (0, 2, 4):
        row = weights[f"embeddings.{layer}.weight"] @ row + weights[f"embeddings.{layer}.bias"]
        row = np.maximum(row, 0) if layer < 4 else row
    with torch.no_grad():
        result = network(torch.from_numpy(example)[None])[0].numpy()
    np.testing.assert_allclose(result, row, rtol=1e-9)
    assert (row < 0).any(), "the last layer has no activation, so negative outputs must occur"


def test_the_full_size_has_the_published_shapes() -> None:
    with torch.device("meta"):
        network = VGGish()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    convolutions = {0: (1, 64), 3: (64, 128), 6: (128, 256), 8: (256, 256), 11: (256, 512), 13: (512, 512)}
    dense = {0: (12288, 4096), 2: (4096, 4096), 4: (4096, 128)}
    expected: dict[str, tuple[int, ...]] = {f"features.{i}.weight": (b, a, 3, 3) for i, (a, b) in convolutions.items()}
    expected |= {f"features.{i}.bias": (b,) for i, (_, b) in convolutions.items()}
    expected |= {f"embeddings.{i}.weight": (b, a) for i, (a, b) in dense.items()}
    expected |= {f"embeddings.{i}.bias": (b,) for i, (_, b) in dense.items()}
    assert shapes == expected


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> VGGish:
    """`vggish` builds a small network of the same class, whose keys are the genuine ones; yields one with weights."""
    monkeypatch.setattr(vggish, "VGGish", lambda: VGGish(SMALL_CHANNELS, SMALL_WIDTHS))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VGGish(SMALL_CHANNELS, SMALL_WIDTHS).eval()


def test_both_published_layouts_have_the_same_identity(small: VGGish, tmp_path: Path) -> None:
    state = small.state_dict()
    torch.save(state | {"pproc.pca_means": torch.zeros(128, 1)}, tmp_path / "torchvggish.pth")
    renamed = {
        key.replace("features.", "features_network.").replace("embeddings.", "embedding_network."): value
        for key, value in state.items()
    }
    torch.save(renamed, tmp_path / "torchaudio.pt")
    mel = torch.randn(3, 96, 64, generator=torch.Generator().manual_seed(0))
    built = [build_encoder("vggish", weights=tmp_path / name) for name in ("torchvggish.pth", "torchaudio.pt")]
    assert built[0].identity == built[1].identity
    for encoder in built:
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode(mel, window=10.0, steps=20)[:, 0], small(mel))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings.4.bias": None}, "1 missing keys: embeddings.4.bias"),
        ({"classifier.weight": torch.zeros(1)}, "1 unexpected keys: classifier.weight"),
        ({"features.0.weight": torch.zeros(2, 3, 3, 3)}, "keys of another shape"),
    ],
)
def test_mismatched_weights_are_rejected(small: VGGish, tmp_path: Path, change: dict, message: str) -> None:
    state = {key: value for key, value in (small.state_dict() | change).items() if value is not None}
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=message):
        build_encoder("vggish", weights=tmp_path / "bad.safetensors")


def test_the_published_file_is_downloaded_and_verified(
    small: VGGish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small.state_dict(), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    good = f"vggish-{sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with fake_hub.serve({good: content, "vggish-10086976.pth": content}) as address:
        monkeypatch.setattr(vggish, "ADDRESS", f"{address}/{good}")
        assert build_encoder("vggish").dim == 128
        monkeypatch.setattr(vggish, "ADDRESS", f"{address}/vggish-10086976.pth")
        with pytest.raises(WeightsError, match="invalid hash value"):
            build_encoder("vggish")
    (tmp_path / "hub" / "checkpoints" / good).write_bytes(content[:-1])
    monkeypatch.setattr(vggish, "ADDRESS", f"{address}/{good}")
    with pytest.raises(WeightsError, match="does not match the checksum in its name"):
        build_encoder("vggish")


def test_an_unresponsive_address_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(vggish, "ADDRESS", "http://127.0.0.1:9/vggish-10086976.pth")
    with pytest.raises(WeightsError, match="--weights vggish=PATH"):
        build_encoder("vggish")


@pytest.mark.parametrize(("window", "steps"), [(10.0, 20), (4.0, 8), (3.0, 7), (1.0, 1)])
def test_vggish_examples_are_centred_on_the_steps(window: float, steps: int) -> None:
    encoder = build_encoder("vggish-tiny")
    times = encoder.step_times(window, steps)  # type: ignore[union-attr]
    np.testing.assert_allclose(times, (np.arange(steps) + 0.5) * window / steps, rtol=1e-12)
    segments = encoder.segments(window, steps)  # type: ignore[union-attr]
    middle = 0.01 * np.array(segments.first) + (95 * 0.01 + 0.025) / 2
    assert segments.frames == 96 and np.abs(middle - times).max() <= 0.005 + 1e-9


def test_the_tiny_encoder_is_reproducible_and_encodes_loudness() -> None:
    one, other = build_encoder("vggish-tiny"), build_encoder("vggish-tiny")
    assert one.identity == other.identity and type(one) is vggish.VggishEncoder and one.front_end != KALDI
    frames = [VGGISH_MEL.open().push(np.float32(scale) * noise(1.2)) for scale in (1.0, 0.1)]
    rows = torch.from_numpy(np.stack([cut(mel, 0, 96, VGGISH_MEL.padding) for mel in frames]))
    loud, soft = one.encode(rows, window=10.0, steps=20)
    assert loud.shape == (1, one.dim) and (loud - soft).norm() > 0.05 * loud.norm()
    with pytest.raises(UsageError, match="seeded"):
        build_encoder("vggish-tiny", weights=Path("x.pth"))


def test_other_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\[B, 96, 64\], got \[2, 998, 128\]"):
        build_encoder("vggish-tiny").encode(torch.zeros(2, 998, 128), window=10.0, steps=20)  # type: ignore[call-arg]
