"""Cached audio features equal Hugging Face's extractor and model on the same ten seconds."""

from pathlib import Path

import numpy as np
import torch

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.audio import decode_audio
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with


def test_a_cached_window_equals_hugging_face(clips: Path, tiny_pair: tuple, tmp_path: Path) -> None:
    from transformers import ASTFeatureExtractor

    root = tmp_path / "data"
    root.mkdir()
    (root / "wolfgang.mp4").symlink_to((clips / "wolfgang.mp4").resolve())
    (root / "obama.mp4").symlink_to((clips / "obama.mp4").resolve())
    audio = tiny_pair[1]
    config = ExtractConfig(visual=(), audio=("ast-tiny",), device="cpu", dtype="float32", face_source="none")
    extract_with(open_dataset(root, "videos"), tmp_path / "cache", config, [], [audio], torch.device("cpu"))
    cache = open_cache(tmp_path / "cache")
    oracle = ASTFeatureExtractor()
    for item in ("obama", "wolfgang"):
        stored, duration = cache.read("ast-tiny", item), cache.meta(item)["duration"]
        wave = np.concatenate(list(decode_audio(root / f"{item}.mp4", start=0.0, duration=duration)))
        for w, start in enumerate(stored.start):
            part = wave[round(start * 16000) : round((start + 10) * 16000)]
            features = oracle(part, sampling_rate=16000, return_tensors="pt").input_values
            with torch.no_grad():
                hidden = audio.module(features).last_hidden_state[0, 2:]
            tokens = hidden.reshape(12, 101, -1).mean(dim=0).numpy()
            steps = np.stack([tokens[5 * k : 5 * k + 5].mean(axis=0) for k in range(20)])
            valid = stored.valid[w]
            assert valid.sum() >= min(20, int((duration - start) / 0.5))
            np.testing.assert_allclose(stored.embedding[w][valid], steps[valid], atol=2e-4)
            np.testing.assert_allclose(stored.time[w], start + 0.5 * np.arange(20) + 0.2875, atol=1e-6)
