"""Statistics of the fusion: those of the gate and the attention that the model computes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, Toy, make_cache
from toy_runs import write_run

from vaflow.cache import Cache
from vaflow.errors import UsageError
from vaflow.files import read_tensors, write_tensors
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_windows
from vaflow.train.run_folder import load_run
from vaflow.train.traces import predict_windows
from vaflow.train.train_run import train_run
from vaflow.viewer.report import write_report
from vaflow.viewer.run_results import FusionStatistics, fusion_statistics

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
    shares = {share.condition: share for share in fusion_statistics(run, cache, "val", 0.66).gates}
    total = shares["all frames with audio"]
    assert [total.mean, total.low, total.high] == pytest.approx([0.25] * 3)
    assert shares["with a face"].frames + shares["without a face"].frames == total.frames
    write_report([run], tmp_path / "report.html", gates=True)
    assert "Share of audio in the fused features" in (tmp_path / "report.html").read_text()


def test_runs_without_a_gate_have_no_shares(cache: Cache, tmp_path: Path) -> None:
    train_run(cache, replace(CONFIG, fusion="concat"), tmp_path / "run", tensorboard=False, figures=False)
    assert fusion_statistics(tmp_path / "run", cache, "val", 0.66) == FusionStatistics()
    write_report([tmp_path / "run"], tmp_path / "report.html", gates=True)
    page = (tmp_path / "report.html").read_text()
    assert "has no fusion gate" in page and "has no cross-modal attention (fusion concat)" in page
    train_run(cache, replace(CONFIG, visual=("none",)), tmp_path / "audio", tensorboard=False, figures=False)
    write_report([tmp_path / "audio"], tmp_path / "report.html", gates=True)
    assert "has no fusion gate (one modality)" in (tmp_path / "report.html").read_text()


def test_attention_sums_equal_numpy(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(cache, replace(CONFIG, fusion="attention"), run, tensorboard=False, figures=False)
    (summary,) = fusion_statistics(run, cache, "val", 0.66).attention
    loaded = load_run(run)
    windows = load_windows(cache, cache.items("val"), loaded.record.head_streams, loaded.record.config)
    fusion = loaded.model.fusion
    assert fusion is not None and fusion.attends is not None
    weights: list[torch.Tensor] = []

    def with_weights(module: Any, arguments: Any) -> None:
        query, keys, track = arguments
        options = {"key_padding_mask": ~(track.key | ~track.present[:, None]), "average_attn_weights": False}
        weights.append(module.attention(query, keys, track.value, **options)[1])

    fusion.attends[0].register_forward_pre_hook(with_weights)
    predict_windows(loaded.model, windows)
    batch = windows.gather(torch.arange(len(windows)))
    w = torch.cat(weights).double().numpy()  # [W, H, F, S]
    near, entropy, masked, frames = 0.0, 0.0, 0.0, 0
    for k in range(len(windows)):
        key = batch.valid[AUDIO][k].numpy() & batch.feature_inside[AUDIO][k].numpy()
        for f in np.flatnonzero(batch.inside[k].numpy()) if key.any() else ():
            offset = batch.feature_time[AUDIO][k].numpy() - float(batch.time[k, f])
            near += w[k, :, f, np.abs(offset) <= 1].sum(axis=0).mean()
            masked += w[k, :, f][:, ~key].sum()
            p = w[k, 0, f][w[k, 0, f] > 0]
            entropy += -(p * np.log(p)).sum() / np.log(max(2, key.sum()))
            frames += 1
    assert summary.stream == AUDIO and summary.frames == frames
    assert summary.near == pytest.approx(near / frames, abs=1e-5)
    assert summary.entropy[0] == pytest.approx(entropy / frames, abs=1e-5)
    assert summary.masked == pytest.approx(masked / frames, abs=1e-6) == 0
    assert summary.shares.sum(axis=1) == pytest.approx(np.ones(len(summary.shares)), abs=1e-5)
    assert summary.near + summary.before + summary.after == pytest.approx(1, abs=1e-5)
    write_report([run], tmp_path / "report.html", gates=True)
    assert "Attention of the frames to the audio" in (tmp_path / "report.html").read_text()


def test_gates_without_the_cache_are_a_usage_error(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"--gates reads the cache of .*/run, which cannot be opened.*omit --gates"):
        write_report([tmp_path / "run"], tmp_path / "report.html", gates=True)
    assert not (tmp_path / "report.html").exists()
