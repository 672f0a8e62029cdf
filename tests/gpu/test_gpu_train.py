"""Stage two on a GPU: training, predictions equal to the CPU's, fine-tuning."""

import json
from pathlib import Path

import pytest
import torch

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import build_model
from vaflow.train.training_loop import fit, seeded
from vaflow.train.windows import Prefetcher

SPLITS = ("train", "val")
TINY = ["--visual", "clip-tiny", "--audio", "ast-tiny", "--workers", "2", "-q"]
SMALL = ["--set", "hidden=16", "--epochs", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def cache(gpu: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "cache"
    assert main(["extract", str(data), "--out", str(out), *TINY, "--device", gpu, "--pixels"]) == 0
    return out


@pytest.mark.parametrize("options", [[], ["--finetune"]])
def test_a_run_predicts_the_same_on_cpu_and_gpu(
    options: list[str], gpu: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(cache), "--out", str(run), "--device", gpu, *SMALL, *options, "-q"]) == 0
    scores = []
    for device in (gpu, "cpu"):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--cache", str(cache), "--json", "--device", device]) == 0
        scores.append(json.loads(capsys.readouterr().out)["ccc"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=5e-3)


def test_features_in_host_memory_train_the_weights_of_features_on_the_gpu(gpu: str, cache: Path) -> None:
    """Rows copied ahead on a stream of their own give the batches of rows on the GPU, and so the same weights."""
    opened, device = open_cache(cache), torch.device(gpu, 0) if gpu == "cuda" else torch.device(gpu)
    config, inputs = resolve(opened, TrainConfig(hidden=16, epochs=2, batch_size=4, device=gpu))
    weights, batches = [], []
    for budget in (None, 0):
        train, val = (load_split(opened, s, inputs.streams, config, device=device, budget=budget) for s in SPLITS)
        assert train.off_device == (budget == 0)
        batches.append(list(Prefetcher[torch.Tensor](train).batches(train.in_order(4))))
        with seeded(0):
            model = build_model(config, inputs.specs, inputs.prototypes).to(device)
        fit(model, train, val, config)
        weights.append(model.state_dict())
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one.features[name], other.features[name]) for name in one.features)
        assert all(torch.equal(one.valid[name], other.valid[name]) for name in one.valid)
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-6), name
