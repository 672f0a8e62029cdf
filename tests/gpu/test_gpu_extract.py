"""Stage one on a GPU: close to the CPU, deterministic, with out-of-memory recovery."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vaflow.cache import Cache, open_cache
from vaflow.cli import main
from vaflow.device import Stopwatch
from vaflow.extract.encoding import FixedBatcher
from vaflow.extract.loop import ON_DEVICE, idle_share

TINY = ["--visual", "clip-tiny", "--audio", "ast-tiny", "--workers", "2"]
ENCODED = ("clip-tiny", "ast-tiny")
STEP = 2.0**-10  # of float16, relative


def extract(data: Path, out: Path, *options: str) -> Cache:
    assert main(["extract", str(data), "--out", str(out), *TINY, *options, "-q"]) == 0
    return open_cache(out)


def bits(cache: Cache) -> dict[tuple[str, str], bytes]:
    return {(s, item): cache.read(s, item).embedding.tobytes() for s in ENCODED for item in cache.items(stream=s)}


@pytest.fixture(scope="module")
def plain(gpu: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(data, tmp_path_factory.mktemp("plain") / "cache", "--device", gpu)


def test_float32_equals_float32_on_cpu(gpu: str, data: Path, plain: Cache, tmp_path: Path) -> None:
    """Tolerance: one float16 step, or that of a sixteenth of the vector's largest value."""
    other = extract(data, tmp_path / "cache", "--device", "cpu")
    for stream, item in bits(plain):
        a, b = (cache.read(stream, item).embedding.astype(np.float64) for cache in (plain, other))
        scale = np.maximum(np.abs(b), np.abs(b).max(axis=-1, keepdims=True) / 16)
        assert (np.abs(a - b) <= STEP * scale).all(), (stream, item, np.abs(a - b).max())
    item = plain.items()[0]
    assert plain.record("clip-tiny", item).meta["device"] == gpu


@pytest.mark.parametrize("options", [["--workers", "1"], ["--store", "hdf5"]])
def test_gpu_results_do_not_depend_on_workers_or_store(
    options: list[str], gpu: str, data: Path, plain: Cache, tmp_path: Path
) -> None:
    assert bits(extract(data, tmp_path / "cache", "--device", gpu, *options)) == bits(plain)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_features_have_high_cosine_similarity_to_float32(
    precision: str, gpu: str, data: Path, plain: Cache, tmp_path: Path
) -> None:
    if gpu == "cpu" and precision == "float16":
        pytest.skip("for GPUs")
    short = extract(data, tmp_path / "cache", "--device", gpu, "--precision", precision)
    assert bits(extract(data, tmp_path / "again", "--device", gpu, "--precision", precision)) == bits(short)
    for stream, item in bits(plain):
        a, b = (cache.read(stream, item) for cache in (plain, short))
        x, y = (one.embedding[a.valid].astype(np.float64) for one in (a, b))
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        assert (cosine > 0.95).all(), (
            "the cosine similarity is 0.9999 at full size; the seeded CLIP has 0.98 on flat images"
        )


def test_compiled_encoders(gpu: str, data: Path, plain: Cache, tmp_path: Path) -> None:
    fused = extract(data, tmp_path / "cache", "--device", gpu, "--compile")
    for stream, item in bits(plain):
        a, b = (cache.read(stream, item).embedding.astype(np.float64) for cache in (plain, fused))
        assert np.abs(a - b).max(initial=0) <= 4 * STEP * np.abs(a).max(initial=0)


def test_batch_size_follows_from_gpu_memory(gpu: str, data: Path, tmp_path: Path) -> None:
    cache = extract(data, tmp_path / "cache", "--device", gpu, "--image-batch", "auto", "--window-batch", "auto")
    [size] = cache.record("clip-tiny", cache.items(stream="clip-tiny")[0]).meta["batch"]
    assert size >= 16 and size & (size - 1) == 0


def test_out_of_memory_halves_the_batch(gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    """Real GPU memory: each row allocates a sixteenth of it."""
    device = torch.device(gpu)
    if device.type != "cuda":
        pytest.skip("for GPUs")
    share = torch.cuda.get_device_properties(device).total_memory // 16

    def encode(batch: torch.Tensor) -> torch.Tensor:
        taken = torch.empty(len(batch) * share, dtype=torch.uint8, device=device)
        return batch.float() + taken[:1].float() * 0

    batcher = FixedBatcher(encode, 32, device)
    got: dict[int, np.ndarray] = {}
    for k in range(40):
        batcher.add(np.array([k], np.uint8), partial(got.__setitem__, k))
    batcher.flush()
    assert {k: float(row[0]) for k, row in got.items()} == {k: float(k) for k in range(40)}
    assert "Too little memory" in caplog.text


def test_the_profile_contains_device_time(
    gpu: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(data), "--out", str(tmp_path / "cache"), *TINY, "--device", gpu, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[ON_DEVICE] > 0
    assert 0 < idle_share(stages) < 1


def test_the_stopwatch_synchronizes_the_device(gpu: str) -> None:
    device = torch.device(gpu)
    one = torch.randn(2048, 2048, device=device)
    short = Stopwatch(device)
    _ = one @ one
    short.stop()
    long = Stopwatch(device)
    for _ in range(40):
        _ = one @ one
    long.stop()
    assert long.seconds > 4 * short.seconds > 0


def test_gpu_detections_equal_opencv(gpu: str, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("obama.mp4", "face_noface.mov"):
        (tmp_path / "data" / name).symlink_to((clips / name).resolve())
    detections = {
        how: extract(tmp_path / "data", tmp_path / how, "--device", gpu, "--detector", how)
        for how in ("opencv", "torch")
    }
    for item in detections["opencv"].items():
        a, b = (cache.read("clip-tiny", item) for cache in detections.values())
        assert a.valid.tolist() == b.valid.tolist()
        apart = np.linalg.norm(a.embedding[a.valid].astype(float) - b.embedding[b.valid].astype(float), axis=-1)
        assert (apart <= 0.02 * np.linalg.norm(a.embedding[a.valid].astype(float), axis=-1)).all()
