"""Compiled encoders: equal features to float32 rounding, equal identity, early error without a compiler."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affwild2_tree import write_video
from torch._inductor.utils import fresh_inductor_cache

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.encoders import build_encoder
from vaflow.extract.encoding import compile_network

BATCH = 4
SIZE = ["--image-batch", str(BATCH)]  # the size that the first test has compiled for: torch reuses its kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")


@pytest.fixture(scope="module", autouse=True)
def scalar_code() -> Iterator[None]:
    """torch finds out for 20 s which vector instructions the compiler knows; vectors are not what is tested here."""
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        yield


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    plain, compiled = build_encoder("clip-tiny"), build_encoder("clip-tiny")
    compile_network(compiled)
    return plain, compiled


@pytest.mark.slow  # compiling takes 10 s, and the option is experimental
def test_compiled_features_equal_eager_features(pair: tuple[Any, Any]) -> None:
    plain, compiled = pair
    torch._dynamo.utils.counters.clear()
    rows = torch.randint(0, 256, (BATCH, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = plain.encode(rows)
    torch.testing.assert_close(compiled.encode(rows), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "the compiled network is used"
    assert compiled.identity == plain.identity
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()


@pytest.mark.slow
def test_records_state_that_the_encoder_was_compiled(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--visual", "clip-tiny"]
    assert main([*command, "--audio", "none", "--faces", "none", "--compile", "--device", "cpu", *SIZE]) == 0
    cache = open_cache(tmp_path / "cache")
    assert cache.record("clip-tiny", "a").meta["compiled"] is True
    assert "compiled" not in cache.record("labels", "a").meta
    assert cache.streams()["clip-tiny"].identity["weights"] == build_encoder("clip-tiny").identity["weights"]


def test_a_missing_compiler_is_reported_before_any_clip_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last in this file: torch has found the compiler already, and searches again for another name."""
    write_video(tmp_path / "data" / "a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    torch._dynamo.reset()
    command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--compile", "--device", "cpu"]
    with fresh_inductor_cache():  # torch would reuse its kernels
        assert main([*command, "--visual", "clip-tiny", "--audio", "none"]) == 1
    printed = capsys.readouterr().err
    assert "cannot compile" in printed and "run without --compile" in printed
    assert not (tmp_path / "cache").exists()
