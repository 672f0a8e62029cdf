"""Imported streams in stage two: at any rate, every sample reads the nearest row within tolerance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vaflow.cache import Cache, open_cache
from vaflow.errors import UsageError
from vaflow.extract.importing import ImportConfig, import_features
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_windows
from vaflow.train.inputs import resolve
from vaflow.train.run_record import check_splits_apart, clip_digests
from vaflow.train.windows import WindowSet

ROUNDING = 1e-5  # seconds: float32 against float64


def imported(tmp: Path, kind: str, time: np.ndarray, missing: tuple[int, ...]) -> Cache:
    """A clip whose features contain their time, in two columns."""
    rows = np.stack([time, np.ones_like(time)], axis=1)
    rows[list(missing)] = np.nan
    (tmp / "f").mkdir()
    np.save(tmp / "f" / "a.npy", rows)
    np.save(tmp / "f" / "a.time.npy", time)
    (tmp / "va").mkdir()
    (tmp / "va" / "a.csv").write_text("time,arousal\n" + "".join(f"{t:.6f},{np.sin(t):.6f}\n" for t in time))
    import_features(tmp / "cache", tmp / "f", ImportConfig("mine", kind, dtype="float32"), labels=tmp / "va")
    return open_cache(tmp / "cache")


def windows_of(cache: Cache, kind: str) -> tuple[WindowSet, TrainConfig]:
    config, inputs = resolve(cache, TrainConfig(kl_weight=0.0))
    assert (config.visual if kind == "visual" else config.audio) == ("mine",)
    return load_windows(cache, ["a"], inputs.streams, config), config


def test_equal_times_are_not_a_shared_recording(tmp_path: Path) -> None:
    (tmp_path / "va").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(ord(name)).normal(size=(9, 2)))
        np.save(tmp_path / f"{name}.time.npy", np.arange(9) / 2)
        (tmp_path / "va" / f"{name}.csv").write_text("time,valence\n0,0.1\n2,0.3\n")
    (tmp_path / "va" / "splits.csv").write_text("name,split\na,train\nb,val\n")
    import_features(tmp_path / "cache", tmp_path, ImportConfig("mine", "visual"), labels=tmp_path / "va")
    cache = open_cache(tmp_path / "cache")
    train, val = (clip_digests(cache, ["mine"], [item]) for item in ("a", "b"))
    check_splits_apart(train, val)
    with pytest.raises(UsageError, match="a and a"):
        check_splits_apart(train, train)


RATES = {
    "a row in five seconds": np.arange(7) * 5.0,
    "25 rows per second": np.arange(800) / 25,
    "3 rows per second": np.arange(90) / 3,
    "unsteady": np.cumsum(np.random.default_rng(0).uniform(0.35, 0.65, 60)),
}


@pytest.mark.parametrize("kind", ["visual", "audio"])
@pytest.mark.parametrize("rate", RATES)
def test_the_nearest_row_is_read_within_tolerance(tmp_path: Path, kind: str, rate: str) -> None:
    time = RATES[rate]
    missing = (2, len(time) // 2)
    windows, config = windows_of(imported(tmp_path, kind, time, missing), kind)
    batch = windows.gather(torch.arange(len(windows)))
    features, valid = batch.features["mine"].numpy(), batch.valid["mine"].numpy()
    interval = float(np.median(np.diff(time)))
    window, steps = config.window, features.shape[1]
    assert window is not None
    if kind == "audio":
        assert steps == max(1, round(window / interval))
    for w, start in enumerate(windows.sample_time[:, 0]):
        for step in range(steps):
            query = windows.sample_time[w, step] if kind == "visual" else start + (step + 0.5) * window / steps
            begin = query if kind == "visual" else query - window / steps / 2
            distance = np.abs(time - query)
            candidates = np.flatnonzero(distance <= distance.min() + ROUNDING)  # two, in the middle between them
            if valid[w, step]:
                assert any(abs(features[w, step, 0] - time[k]) < ROUNDING for k in candidates)
                assert features[w, step, 1] == 1 and not set(candidates.tolist()) <= set(missing)
                continue
            reasons = (
                bool(set(candidates.tolist()) & set(missing)),
                distance.min() >= interval / 2 - ROUNDING,
                begin >= windows.clips[0].duration - ROUNDING,
            )
            assert any(reasons), (w, step, query)


@pytest.mark.parametrize("rate", [25.0, 30.0, 3.0, 12.5])
def test_features_at_a_constant_rate_are_read_row_by_row(tmp_path: Path, rate: float) -> None:
    """The centre of a step lies between two rows: the earlier one is used, so that every row is read once."""
    time = np.arange(int(31 * rate)) / rate
    windows, _ = windows_of(imported(tmp_path, "audio", time, ()), "audio")
    batch = windows.gather(torch.arange(len(windows)))
    for w, start in enumerate(windows.sample_time[:, 0].tolist()):
        read = batch.features["mine"][w, :, 0][batch.valid["mine"][w]].numpy()
        np.testing.assert_allclose(np.diff(read), 1 / rate, atol=2 * ROUNDING)
        if (start * rate).is_integer():
            assert read[0] == pytest.approx(start, abs=ROUNDING)


def test_one_modality_and_one_dimension_make_batches(tmp_path: Path) -> None:
    windows, _ = windows_of(imported(tmp_path, "audio", RATES["25 rows per second"], ()), "audio")
    batch = windows.gather(torch.arange(len(windows)))
    assert set(batch.features) == {"mine"} and batch.labelled[..., 1].any() and not batch.labelled[..., 0].any()
    when = windows.sample_time[batch.labelled[..., 1].numpy()]
    np.testing.assert_allclose(batch.target[..., 1][batch.labelled[..., 1]], np.sin(when), atol=0.021)


@pytest.mark.parametrize("kind", ["visual", "audio"])
def test_slow_features_use_windows_of_twenty_rows(tmp_path: Path, kind: str) -> None:
    time = np.arange(60) * 5.0
    _, config = windows_of(imported(tmp_path, kind, time, ()), kind)
    assert (config.window, config.stride, config.frames) == (100.0, 30.0, 20)


def test_a_given_window_is_kept(tmp_path: Path) -> None:
    cache = imported(tmp_path, "visual", np.arange(60) * 5.0, ())
    config, _ = resolve(cache, TrainConfig(kl_weight=0.0, window=60.0, frames=12))
    assert (config.window, config.frames) == (60.0, 12)
