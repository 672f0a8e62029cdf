"""The layer mixture equals its equation and selects the layer with the signal."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vaflow.cache import create_cache
from vaflow.cache.schema import LABELS, StreamInfo, array_problems
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.heads.layers import LayerMixture
from vaflow.train.run_folder import RunFolder
from vaflow.train.train_run import train_run

SAMPLING = {"window": 4.0, "stride": 2.0, "frames": 8, "audio_steps": 8}
LAYERED = StreamInfo("deep", "visual", 6, "float32", {"encoder": "toy", "layers": [3, 4, 5, 6], "sampling": SAMPLING})


def test_the_layer_mixture_is_a_softmax_weighted_mean() -> None:
    mixture = LayerMixture(3)
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixture(x), x.mean(dim=2))
    with torch.no_grad():
        mixture.weight.copy_(torch.tensor([0.0, 0.1, -0.2]))
    shares = np.exp([0.0, 1.0, -2.0]) / np.exp([0.0, 1.0, -2.0]).sum()
    expected = sum(float(share) * x[:, :, layer] for layer, share in enumerate(shares))
    torch.testing.assert_close(mixture(x), expected)
    np.testing.assert_allclose(mixture.shares.numpy(), shares, atol=1e-6)
    with pytest.raises(ValueError, match="3, D"):
        mixture(torch.zeros(2, 4, 4))


def test_the_layer_axis_is_checked() -> None:
    good = {"embedding": np.zeros((5, 4, 6), np.float32), "time": np.arange(5.0), "valid": np.ones(5, bool)}
    assert array_problems(LAYERED, good) == []
    for shape in ((5, 3, 6), (5, 4, 7), (5, 6), (4, 4, 6)):
        assert array_problems(LAYERED, good | {"embedding": np.zeros(shape, np.float32)}), shape


@pytest.mark.parametrize(
    "normalize", ["standard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layer", "none"))]
)
def test_a_signal_in_one_layer_gets_the_largest_weight(tmp_path: Path, normalize: str) -> None:
    cache = create_cache(tmp_path / "cache")
    cache.declare(LAYERED)
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2, 6))
    for number in range(10):
        time = np.arange(0, 20, 0.5)
        value = 0.6 * np.sin(time[:, None] * rng.uniform(0.2, 1.0, 2) + rng.uniform(0, 6, 2))
        embedding = rng.normal(size=(40, 4, 6)).astype(np.float32)
        embedding[:, 2] = 2 * value @ mix + 0.2 * rng.normal(size=(40, 6))
        cache.write("deep", f"c{number}", {"embedding": embedding, "time": time, "valid": np.ones(40, bool)})
        labels = {"time": time, "value": value.astype(np.float32), "valid": np.ones((40, 2), bool)}
        meta = {"split": "val" if number > 6 else "train", "duration": 20.0, "frames": 40, "rows": 40}
        cache.write(LABELS, f"c{number}", labels, meta=meta)
    config = TrainConfig(
        hidden=16, lr=1e-2, batch_size=8, epochs=8, device="cpu", audio=(), kl_weight=0.0, normalize=normalize
    )
    result = train_run(cache, config, tmp_path / "run", tensorboard=False, figures=False)
    shares = result.metrics["layer_shares"]["deep"]
    assert int(np.argmax(shares)) == 2 and shares[2] > 0.5, shares
    assert result.metrics["ccc"]["mean"] > 0.5
    evaluate_run(tmp_path / "run", cache, device="cpu")
    assert RunFolder(tmp_path / "run").read_metrics()["layer_shares"] == result.metrics["layer_shares"]
