"""Traces and metrics equal manual interpolation and the formula over all frames."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.encoders.prompts import REGIONS
from vaflow.errors import DataError
from vaflow.train.batch import Batch, Output
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.inputs import resolve
from vaflow.train.prediction_files import prediction_csv, write_predictions
from vaflow.train.scores import evaluate_windows, failed_items, score
from vaflow.train.traces import predict_clips
from vaflow.train.windows import WindowSet


class FunctionModel(nn.Module):
    """A model whose output is a function of (absolute seconds [B, F], batch)."""

    def __init__(self, windows: WindowSet, function: Callable[[Tensor, Batch], Tensor], regions: Tensor | None = None):
        super().__init__()
        self.time = torch.from_numpy(windows.sample_time)
        self.function, self.regions = function, regions

    def forward(self, batch: Batch) -> Output:
        va = self.function(self.time[batch.window], batch).float()
        logits = None if self.regions is None else self.regions.expand(*va.shape[:2], 9)
        return Output(va, logits)


def windows_of(cache: Cache, split: str = "val") -> WindowSet:
    config, inputs = resolve(cache, TrainConfig())
    return load_split(cache, split, inputs.streams, config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("evaluate") / "cache", Toy(splits={"val": 5}))


@pytest.fixture(scope="module")
def windows(cache: Cache) -> WindowSet:
    return windows_of(cache)


def wave(time: Tensor, batch: Batch | None = None) -> Tensor:
    return torch.stack([torch.sin(time), torch.cos(0.7 * time)], dim=-1) * 0.9


def test_predictions_are_interpolated_between_samples_and_held_outside(windows: WindowSet, cache: Cache) -> None:
    for trace in predict_clips(FunctionModel(windows, wave), windows, batch_size=3):
        grid_times = cache.read(VISUAL, trace.clip.item).time
        samples = wave(torch.from_numpy(grid_times)).numpy()
        expected = np.stack([np.interp(trace.clip.time, grid_times, column) for column in samples.T], axis=1)
        np.testing.assert_allclose(trace.va, expected, atol=1e-6)
        assert trace.regions is None


def test_constant_predictions_are_reproduced_and_clipped(windows: WindowSet) -> None:
    for value, expected in ((0.25, 0.25), (1.5, 1.0), (-7.0, -1.0)):

        def constant(time: Tensor, batch: Batch, value: float = value) -> Tensor:
            return torch.full((*time.shape, 2), value)

        for trace in predict_clips(FunctionModel(windows, constant), windows):
            assert (trace.va == expected).all()


def test_traces_exclude_padding(windows: WindowSet) -> None:
    def wild(time: Tensor, batch: Batch) -> Tensor:
        return torch.where(batch.inside.unsqueeze(-1), wave(time), torch.nan)

    clean = list(predict_clips(FunctionModel(windows, wave), windows))
    dirty = list(predict_clips(FunctionModel(windows, wild), windows))
    assert all((a.va == b.va).all() for a, b in zip(clean, dirty, strict=True))


def test_overlapping_windows_are_averaged(windows: WindowSet) -> None:
    """Each window predicts its number; a frame's value is the mean over its windows."""
    model = FunctionModel(windows, lambda t, b: (b.window % 7).double().div(10)[:, None, None].expand(*t.shape, 2))
    for trace in predict_clips(model, windows):
        clip = trace.clip
        for row in range(0, len(clip.time), 13):
            at = windows.sample_time[clip.first : clip.last]
            instants = np.unique(at[windows.inside_array[clip.first : clip.last]])
            means = [
                np.mean([((clip.first + w) % 7) / 10 for w in range(len(at)) if t in at[w].tolist()]) for t in instants
            ]
            assert trace.va[row, 0] == pytest.approx(np.interp(clip.time[row], instants, means), abs=1e-6)


def test_metrics_are_over_all_labelled_frames_concatenated(windows: WindowSet, cache: Cache) -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(scale=0.3, size=(*windows.sample_time.shape, 2)))
    model = FunctionModel(windows, lambda t, b: b.target + noise[b.window])
    report, traces = evaluate_windows(model, windows, "val", resamples=200)
    x = np.concatenate([trace.va for trace in traces])
    labels = [cache.read(LABELS, item) for item in cache.items(split="val")]
    y, valid = np.concatenate([i.value for i in labels]), np.concatenate([i.valid for i in labels])
    assert report["n_frames"] == int(valid.any(axis=1).sum()) and report["n_clips"] == report["n_videos"] == 5
    ccc = []
    for k, name in enumerate(("valence", "arousal")):
        a, b = x[valid[:, k], k], y[valid[:, k], k].astype(np.float64)
        ccc.append(2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2))
        assert report["ccc"][name] == pytest.approx(ccc[-1])
        assert report["rmse"][name] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
        assert report["pearson"][name] == pytest.approx(np.corrcoef(a, b)[0, 1])
        low, high = report["ci95"][name]
        assert low <= high
    assert report["ccc"]["mean"] == pytest.approx(np.mean(ccc))
    np.testing.assert_allclose(score(traces), [*ccc, np.mean(ccc)])
    json.dumps(report, allow_nan=False)


def test_perfect_predictions_score_one_and_constants_zero(windows: WindowSet) -> None:
    perfect, _ = evaluate_windows(FunctionModel(windows, lambda t, b: b.target), windows, "val", resamples=50)
    assert perfect["ccc"]["mean"] > 0.95 and perfect["warnings"] == []
    constant, _ = evaluate_windows(
        FunctionModel(windows, lambda t, b: torch.zeros(*t.shape, 2)), windows, "val", resamples=50
    )
    assert constant["ccc"]["mean"] == 0
    assert [w.split(" (")[0] for w in constant["warnings"]] == [
        "predictions of valence are nearly constant",
        "predictions of arousal are nearly constant",
    ]


def test_the_bootstrap_resamples_groups(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(splits={"val": 2}))
    left = cache.read(LABELS, "val1")
    cache.write(LABELS, "val1", left.arrays, meta={**left.meta, "group": "val0"})
    windows = windows_of(cache)
    report, _ = evaluate_windows(FunctionModel(windows, lambda t, b: b.target), windows, "val")
    assert (report["n_videos"], report["n_clips"]) == (1, 2)
    assert report["ci95"]["mean"] == [None, None]  # one video has no spread


def test_one_dimension_only(tmp_path: Path) -> None:
    windows = windows_of(make_cache(tmp_path / "c", Toy(splits={"val": 2}, targets=(1,))))
    report, _ = evaluate_windows(FunctionModel(windows, lambda t, b: b.target), windows, "val", resamples=50)
    assert report["ccc"]["valence"] is None and report["ci95"]["valence"] == [None, None]
    assert report["ccc"]["mean"] == pytest.approx(report["ccc"]["arousal"])
    assert "valence is not labelled in this split" in report["warnings"]


def test_region_probabilities_are_written(windows: WindowSet) -> None:
    report, traces = evaluate_windows(
        FunctionModel(windows, lambda t, b: b.target, torch.eye(9)[4] * 50), windows, "val", resamples=10
    )
    labels = np.concatenate([t.clip.value[t.clip.valid.all(axis=1)] for t in traces])
    neutral = (np.abs(labels) < 0.33).all(axis=1).mean()
    assert report["regions"]["accuracy"] == pytest.approx(neutral, abs=1e-9)
    for trace in traces:
        assert trace.regions is not None
        np.testing.assert_allclose(trace.regions.sum(axis=1), 1, atol=1e-6)


def without_features(path: Path) -> Cache:
    cache = make_cache(path, Toy(splits={"val": 3}))
    for stream in (VISUAL, AUDIO):
        cache.drop(stream, "val1")
    cache.drop(AUDIO, "val2")
    return cache


def test_labelled_clips_without_features_are_an_error(tmp_path: Path) -> None:
    cache = without_features(tmp_path / "c")
    windows = windows_of(cache)
    model = FunctionModel(windows, lambda t, b: b.target)
    frames = int(cache.read(LABELS, "val1").valid.any(axis=1).sum())
    with pytest.raises(DataError, match=rf"{frames} labelled frames of 1 clip have no features: val1"):
        evaluate_windows(model, windows, "val")
    report, _ = evaluate_windows(model, windows, "val", allow_missing=True)
    assert report["missing"] == {"clips": ["val1"], "frames": frames, "streams": {AUDIO: 1}}
    assert report["n_clips"] == 2


def test_clips_missing_from_the_cache_are_counted(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(splits={"val": 2}))
    lines = [
        {"item": "val1", "stage": "faces", "error": "MediaError", "message": "now it is there"},
        {"item": "lost", "stage": "open", "error": "MediaError", "message": "no video"},
        {"item": "elsewhere", "stage": "open", "error": "MediaError", "message": "", "split": "train"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (cache.path / "failures-1-of-2.jsonl").write_text(text + '{"item": "ki')  # as after a killed extraction
    assert failed_items(cache, "val") == ["lost"]
    windows = windows_of(cache)
    model = FunctionModel(windows, lambda t, b: b.target)
    with pytest.raises(DataError, match=r"1 clip could not be extracted.*lost"):
        evaluate_windows(model, windows, "val", failed=["lost"])
    report, _ = evaluate_windows(model, windows, "val", failed=["lost"], allow_missing=True, resamples=10)
    assert report["missing"]["clips"] == ["lost"]


@pytest.mark.parametrize("item", ["../outside", "/outside", "a/../../outside", "a\0b", "x" * 300])
def test_clip_names_cannot_escape_the_output_directory(windows: WindowSet, tmp_path: Path, item: str) -> None:
    """Names come from caches, which other people may have written."""
    trace = next(iter(predict_clips(FunctionModel(windows, wave), windows)))
    folder = tmp_path / "run" / "predictions"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be that of a file"):
        write_predictions(folder, [replace(trace, clip=replace(trace.clip, item=item))])
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "predictions"]


def test_prediction_files(windows: WindowSet, tmp_path: Path) -> None:
    traces = list(predict_clips(FunctionModel(windows, wave), windows))
    write_predictions(tmp_path, traces)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{trace.clip.item}.csv" for trace in traces]
    for trace in traces:
        rows = list(csv.DictReader(io.StringIO((tmp_path / f"{trace.clip.item}.csv").read_text())))
        assert list(rows[0])[:4] == ["frame", "time", "valence", "arousal"]
        assert len(rows) == len(trace.clip.time)  # every row, labelled or not
        assert [int(row["frame"]) for row in rows] == list(range(len(rows)))
        for column, expected in (
            ("time", trace.clip.time),
            ("valence", trace.va[:, 0]),
            ("arousal", trace.va[:, 1]),
            ("label_valence", trace.clip.value[:, 0]),
            ("label_arousal", trace.clip.value[:, 1]),
        ):
            got = [float(row[column] or "nan") for row in rows]
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_unlabelled_clip_has_no_label_columns(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(splits={"test": 1}, targets=()))
    config, inputs = resolve(cache, TrainConfig())
    from vaflow.train.data import load_windows

    windows = load_windows(cache, ["test0"], inputs.streams, config)
    (trace,) = predict_clips(FunctionModel(windows, wave), windows)
    assert prediction_csv(trace).splitlines()[0] == "frame,time,valence,arousal,face,audio,region,interpolated"


def test_smoothness_of_a_straight_line_is_its_slope(windows: WindowSet) -> None:
    report, _ = evaluate_windows(
        FunctionModel(windows, lambda t, b: torch.stack([t * 0.01, -t * 0.02], dim=-1)), windows, "val", resamples=10
    )
    # held after the last sample, for less than one step
    assert report["smoothness"]["prediction"]["valence"] == pytest.approx(0.01, rel=0.05)
    assert report["smoothness"]["prediction"]["arousal"] == pytest.approx(0.02, rel=0.05)


def test_a_non_finite_prediction_names_its_clip(windows: WindowSet) -> None:
    last = len(windows) - 1

    def broken(time: Tensor, batch: Batch) -> Tensor:
        return torch.where((batch.window == last)[:, None, None], torch.nan, wave(time))

    with pytest.raises(DataError, match="'val4'"):
        list(predict_clips(FunctionModel(windows, broken), windows))


def test_prediction_csv_has_validity_and_most_likely_region(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(splits={"val": 2}, invalid=0.3))
    windows = windows_of(cache)
    for trace in predict_clips(FunctionModel(windows, wave), windows):
        rows = [line.split(",") for line in prediction_csv(trace).splitlines()]
        names, table = rows[0], np.array(rows[1:])
        region = names.index("region")
        assert names[:4] == ["frame", "time", "valence", "arousal"]
        assert names[region - 2 :] == ["face", "audio", "region", "interpolated"]
        for name, kind in (("face", "visual"), ("audio", "audio")):
            instants, valid = windows.sample_validity(trace.clip, kind)
            flags = table[:, names.index(name)].astype(int)
            assert flags.mean() < 1 or kind == "audio"
            for t, flag in zip(trace.clip.time, flags, strict=True):
                gaps = np.abs(instants - t)
                if kind == "visual" and np.sort(gaps)[1] > gaps.min() + 1e-6:  # no tie
                    assert flag == valid[gaps.argmin()]
                if kind == "audio" and (gaps > 1e-6).all() and t > instants[0]:
                    assert flag == valid[instants < t][-1]
        va = table[:, 2:4].astype(float)
        corners = np.array([(v, a) for v in (-0.66, 0, 0.66) for a in (-0.66, 0, 0.66)])
        nearest = np.square(va[:, None] - corners).sum(-1).argmin(-1)
        expected = nearest if trace.regions is None else trace.regions.argmax(-1)
        assert [*table[:, region]] == ["_".join(REGIONS[k]) for k in expected]
