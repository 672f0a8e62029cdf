"""Scores of intensity bins and groups equal explicit masks."""

from pathlib import Path

import numpy as np
import pytest

from vaflow.errors import UsageError
from vaflow.train.folds import read_groups
from vaflow.train.metrics import by_intensity, intensity_bins
from vaflow.train.scores import Scored, by_group


def ccc(x: np.ndarray, y: np.ndarray) -> float:
    return 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def clips(count: int = 5, frames: int = 60) -> list[Scored]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        label = np.clip(rng.normal(scale=0.5, size=(frames, 2)), -1, 1)
        prediction = np.clip(0.7 * label + rng.normal(scale=0.2, size=label.shape), -1, 1)
        made.append(Scored(f"c{k}", f"v{k // 2}", prediction, label, rng.random(label.shape) > 0.2))
    return made


def test_intensity_bins_hold_a_third_of_the_frames_each() -> None:
    one = clips(1, 300)[0]
    scores = by_intensity(one.prediction, one.label, one.valid)
    for k, name in enumerate(("valence", "arousal")):
        x, y = one.prediction[one.valid[:, k], k], one.label[one.valid[:, k], k]
        order = np.argsort(np.abs(y))
        parts = np.array_split(order, 3)
        assert sum(part["n_frames"] for part in scores[name]) == len(y)
        for in_bin, part in zip(parts, scores[name], strict=True):
            assert abs(part["n_frames"] - len(in_bin)) <= 1
        low, high = (np.quantile(np.abs(y), q) for q in (1 / 3, 2 / 3))
        masks = [np.abs(y) <= low, (np.abs(y) > low) & (np.abs(y) <= high), np.abs(y) > high]
        for mask, part in zip(masks, scores[name], strict=True):
            assert part["ccc"] == pytest.approx(ccc(x[mask], y[mask]))
            assert part["rmse"] == pytest.approx(np.sqrt(np.mean((x[mask] - y[mask]) ** 2)))
            assert (part["from"], part["to"]) == (np.abs(y[mask]).min(), np.abs(y[mask]).max())
            toward = np.where(y[mask] > 0, x[mask] - y[mask], y[mask] - x[mask])
            assert part["bias"] == pytest.approx(toward.mean())
        assert scores[name][-1]["bias"] < 0  # predictions of 0.7 times the label are too small for strong labels


def test_equal_intensities_share_a_bin() -> None:
    label = np.array([0.0] * 50 + [-0.0] * 20 + [0.5] * 20 + [-1.0] * 10)  # most of Aff-Wild2 is about neutral
    bins = intensity_bins(label)
    assert [int(mask.sum()) for mask in bins] == [70, 30]
    assert [set(np.abs(label[mask])) for mask in bins] == [{0.0}, {0.5, 1.0}]
    assert intensity_bins(np.zeros(0)) == []
    [one] = intensity_bins(np.full(4, 0.3))
    assert one.all()


def test_groups_are_scored_separately_and_can_be_defined_per_video(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("item,gender,age\nc0,f,young\nc1,m,\nv1,f,old\nelsewhere,m,old\n")
    some = clips()
    scores = by_group(some, read_groups(path))
    assert {kind: sorted(parts) for kind, parts in scores.items()} == {
        "gender": ["f", "m", "unknown"],
        "age": ["old", "unknown", "young"],
    }
    members = [some[0], some[2], some[3]]  # c0 itself, c2 and c3 through their video v1
    x, y, valid = (np.concatenate([getattr(c, name) for c in members]) for name in ("prediction", "label", "valid"))
    part = scores["gender"]["f"]
    assert (part["n_clips"], part["n_frames"]) == (3, int(valid.any(axis=1).sum()))
    assert part["ccc"]["arousal"] == pytest.approx(ccc(x[valid[:, 1], 1], y[valid[:, 1], 1]))
    assert part["ccc"]["mean"] == pytest.approx((part["ccc"]["valence"] + part["ccc"]["arousal"]) / 2)
    assert sum(p["n_clips"] for p in scores["age"].values()) == len(some)


@pytest.mark.parametrize("text", ["clip,gender\nc0,f\n", "gender,name\nf,c0\n", "item,gender\nc0,f\n"])
def test_the_column_of_clips_has_one_of_three_names(tmp_path: Path, text: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_text(text)
    assert read_groups(path) == {"gender": {"c0": "f"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speaker,gender\nc0,f\n", "item,gender,age"),
        ("item\nc0\n", "item,gender,age"),
        ("", "no rows"),
        ("item,gender\nc0,f\nc0,m\n", "items with several rows"),
    ],
)
def test_files_without_groups_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_groups(path)


def test_groups_of_unknown_clips_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("item,gender\nx,f\n")
    with pytest.raises(UsageError, match="items such as c0"):
        by_group(clips(), read_groups(path))
    with pytest.raises(UsageError, match="Cannot read"):
        read_groups(tmp_path / "absent.csv")
