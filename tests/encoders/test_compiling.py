"""Compiled encoders: equal features to float32 rounding, equal identity, early error without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affwild2_tree import write_video

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.encoders import build_encoder
from vaflow.extract.batching import compile_network

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    plain, compiled = build_encoder("clip-tiny"), build_encoder("clip-tiny")
    compile_network(compiled)
    return plain, compiled


def test_compiled_features_equal_eager_features(pair: tuple[Any, Any]) -> None:
    plain, compiled = pair
    rows = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = plain.encode(rows)
    torch.testing.assert_close(compiled.encode(rows), expected, rtol=1e-4, atol=1e-5)
    assert compiled.identity == plain.identity
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()


def test_the_compiled_network_is_used(pair: tuple[Any, Any]) -> None:
    torch._dynamo.utils.counters.clear()
    compiled = pair[1]
    compiled.encode(torch.zeros((3, 224, 224, 3), dtype=torch.uint8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "a new size is compiled for"


def test_a_missing_compiler_is_reported_before_any_clip_is_read(tmp_path: Path) -> None:
    """Run in a subprocess, because torch searches for a compiler only once."""
    write_video(tmp_path / "data" / "a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    command = ["-m", "vaflow", "extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--compile"]
    without = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(
        [sys.executable, *command, "--visual", "clip-tiny", "--audio", "none"],
        env=without,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot compile" in done.stderr
    assert "run without --compile" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_records_state_that_the_encoder_was_compiled(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--visual", "clip-tiny"]
    assert main([*command, "--audio", "none", "--faces", "none", "--compile", "--device", "cpu"]) == 0
    cache = open_cache(tmp_path / "cache")
    assert cache.record("clip-tiny", "a").meta["compiled"] is True
    assert "compiled" not in cache.record("labels", "a").meta
    assert cache.streams()["clip-tiny"].identity["weights"] == build_encoder("clip-tiny").identity["weights"]
