"""The fusion gate: what is reported is what the gate computes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache
from vaflow.train.config import TrainConfig
from vaflow.train.storage import read_tensors, write_tensors
from vaflow.train.training import train_run
from vaflow.viewer.gates import gate_shares
from vaflow.viewer.report import write_report

CONFIG = TrainConfig(hidden=16, lr=3e-3, batch_size=8, epochs=1, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("gates") / "cache", Toy(seconds=(8, 14)))


def test_a_constant_gate_is_reported_exactly(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(cache, replace(CONFIG, fusion="gated"), run, tensorboard=False, figures=False)
    weights, meta = read_tensors(run / "model.safetensors")
    [weight], [bias] = ([n for n in weights if n.endswith(f"gate.{kind}")] for kind in ("weight", "bias"))
    weights[weight] = torch.zeros_like(weights[weight])
    weights[bias] = torch.full_like(weights[bias], math.log(0.25 / 0.75))
    write_tensors(run / "model.safetensors", weights, meta)
    shares = {share.condition: share for share in gate_shares(run, cache, "val", 0.66)}
    total = shares["all frames with audio"]
    assert [total.mean, total.low, total.high] == pytest.approx([0.25] * 3)
    assert shares["with a face"].frames + shares["without a face"].frames == total.frames
    write_report([run], tmp_path / "report.html", gates=True)
    assert "Share of audio in the fused features" in (tmp_path / "report.html").read_text()


def test_runs_without_a_gate_have_no_shares(cache: Cache, tmp_path: Path) -> None:
    train_run(cache, replace(CONFIG, fusion="concat"), tmp_path / "run", tensorboard=False, figures=False)
    assert gate_shares(tmp_path / "run", cache, "val", 0.66) == []
    write_report([tmp_path / "run"], tmp_path / "report.html", gates=True)
    assert "has no fusion gate" in (tmp_path / "report.html").read_text()
