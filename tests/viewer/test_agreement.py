"""Agreement equals published examples and definitions; lags and fusion recover known signals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_runs import ccc

import vaflow.viewer.ratings
from vaflow.cli import main
from vaflow.datasets.videos import read_csv
from vaflow.viewer.ratings import (
    AgreeConfig,
    cohen_kappa,
    compare_ratings,
    delay,
    evaluator_weights,
    fuse_ratings,
    icc,
    mean_kappa,
    pairwise_ccc,
    read_ratings,
)

Floats = NDArray[np.float64]

# Shrout and Fleiss (1979), table 2: six targets by four judges.
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_icc_equals_the_published_example() -> None:
    values = icc(np.array(SHROUT_FLEISS).T)
    expected = {"ICC(2,1)": 0.29, "ICC(2,k)": 0.62, "ICC(3,1)": 0.71, "ICC(3,k)": 0.91}
    assert {name: round(value, 2) for name, value in values.items()} == expected


def test_kappa_equals_a_worked_example() -> None:
    one = [0] * 25 + [1] * 25  # 20 and 15 of 50 agree, 5 and 10 do not
    other = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert cohen_kappa(one, other, categories=2) == pytest.approx(0.4)
    assert mean_kappa([one, other, one]) == pytest.approx((0.4 + 1 + 0.4) / 3)
    assert np.isnan(cohen_kappa([3, 3], [3, 3]))


def test_kappa_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_cohen_kappa  # 3 s

    one, other = np.random.default_rng(0).integers(0, 9, (2, 500))
    expected = multiclass_cohen_kappa(torch.from_numpy(one), torch.from_numpy(other), num_classes=9)
    assert cohen_kappa(one, other) == pytest.approx(float(expected), abs=1e-6)


def test_ccc_of_pairs_follows_its_definition() -> None:
    ratings = np.random.default_rng(1).normal(size=(3, 100)) + np.linspace(-1, 1, 100)
    computed = pairwise_ccc(ratings)
    assert computed[0, 2] == pytest.approx(ccc(ratings[0], ratings[2]))
    assert np.allclose(computed, computed.T)
    assert np.allclose(np.diag(computed), 1)


@pytest.mark.parametrize("shift", [-20, -3, 0, 1, 17])
def test_a_delay_is_recovered(shift: int) -> None:
    signal = np.cumsum(np.random.default_rng(2).normal(size=(2, 600)), axis=1)
    noise = np.random.default_rng(3).normal(size=(2, 500)) * 0.1
    assert delay(signal[:, 50:550], signal[:, 50 - shift : 550 - shift] + noise, 40) == shift


def test_evaluator_weights_follow_their_definition() -> None:
    truth = np.sin(np.arange(400) / 20)
    rng = np.random.default_rng(4)
    ratings = np.stack([truth + rng.normal(0, s, 400) for s in (0.1, 0.2, 0.3, 0.4, 1.5)])
    weights = evaluator_weights(ratings)
    by_definition = np.array([np.corrcoef(x, ratings.mean(axis=0))[0, 1] for x in ratings])
    assert weights == pytest.approx(by_definition / by_definition.sum())
    assert weights[0] > 1.2 * weights[4]
    assert evaluator_weights(np.stack([truth, truth])) == pytest.approx([0.5, 0.5])
    assert evaluator_weights(np.ones((2, 5))) == pytest.approx([0.5, 0.5])


def affect(t: Floats) -> Floats:
    """[N, 2]: a signal without period."""
    return np.stack([0.5 * np.sin(t / 3) + 0.3 * np.sin(t / 1.1), 0.6 * np.cos(t / 4) + 0.2 * np.sin(t / 0.9)], axis=1)


def write_rating(path: Path, lag: float, noise: float, seed: int, seconds: float = 60) -> None:
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.uniform(0.01, 0.06, int(seconds / 0.035)))
    value = np.clip(affect(time - lag) + rng.normal(0, noise, (len(time), 2)), -1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{t:.6f},{v:.4f},{a:.4f},x" for t, (v, a) in zip(time, value, strict=True)]
    path.write_text("\n".join(["time,valence,arousal,annotator", *rows]) + "\n")


LAGS = {"ann": 0.5, "bob": 1.2, "eve": 2.5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k, (name, lag) in enumerate(LAGS.items()):
        for clip in ("one", "sub/two"):
            write_rating(tmp_path / "ratings" / name / f"{clip}.csv", lag, 0.05, seed=10 * k + len(clip))
    return tmp_path / "ratings"


def test_annotator_lags_are_estimated_and_removed(root: Path) -> None:
    ratings = read_ratings(root)
    raw = compare_ratings(ratings, AgreeConfig())
    aligned = compare_ratings(ratings, AgreeConfig(max_lag=4))
    assert raw.lags == dict.fromkeys(LAGS, 0.0)
    for name, lag in LAGS.items():
        assert aligned.lags[name] == pytest.approx(lag - 0.5, abs=0.09)
    assert aligned.icc["valence"]["ICC(2,1)"] > 0.9 > raw.icc["valence"]["ICC(2,1)"]
    assert aligned.kappa > raw.kappa


def test_a_reference_gives_the_lag_of_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    time = np.arange(1400) / 25
    rows = [f"{k},{t:.6f},{v:.6f},{a:.6f}" for k, (t, (v, a)) in enumerate(zip(time, affect(time), strict=True))]
    (tmp_path / "predictions" / "one.csv").write_text("\n".join(["frame,time,valence,arousal", *rows]) + "\n")
    agreement = compare_ratings(read_ratings(root), AgreeConfig(max_lag=4, reference=tmp_path / "predictions"))
    assert agreement.lags == pytest.approx(LAGS, abs=0.09)


@pytest.mark.parametrize("fusion", ["mean", "ewe"])
def test_fused_labels_follow_the_signal(root: Path, tmp_path: Path, fusion: str) -> None:
    ratings, config = read_ratings(root), AgreeConfig(max_lag=4, fusion=fusion)
    agreement = compare_ratings(ratings, config)
    written = fuse_ratings(ratings, agreement, config, tmp_path / "fused")
    assert [path.relative_to(tmp_path / "fused").as_posix() for path in written] == ["one.csv", "sub/two.csv"]
    fused = read_csv(written[0])
    assert fused.time is not None
    assert ccc(fused.value[:, 0].astype(float), affect(fused.time - 0.5)[:, 0]) > 0.98


def test_files_named_after_clip_and_annotator_are_read(tmp_path: Path) -> None:
    write_rating(tmp_path / "clip.one.ann.csv", 0, 0.1, 0)
    write_rating(tmp_path / "clip.one.bob.csv", 0, 0.1, 1)
    assert {clip: sorted(by_annotator) for clip, by_annotator in read_ratings(tmp_path).items()} == {
        "clip.one": ["ann", "bob"]
    }


def test_the_command_prints_and_fuses(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["labels", "agree", str(root), "--max-lag", "4", "--fuse", "ewe", "--out", str(tmp_path / "fused")]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["annotators"] == ["ann", "bob", "eve"]
    assert len(document["labels"]) == 2
    assert main(command) == 0
    assert "Cohen's kappa" in capsys.readouterr().out


def test_agreement_requires_two_annotators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rating(tmp_path / "ann" / "one.csv", 0, 0.1, 0)
    assert main(["labels", "agree", str(tmp_path)]) == 2
    assert "two annotators" in capsys.readouterr().err
    assert main(["labels", "agree", str(tmp_path / "none")]) == 2
    assert "has no ratings" in capsys.readouterr().err


def rate_clip(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["time,valence,arousal", *rows]) + "\n")


def test_pauses_of_an_annotator_stay_unlabelled(tmp_path: Path) -> None:
    rate_clip(tmp_path / "ann" / "one.csv", "0,0,0", "1,0.1,0", "2,-5,-5", "3,0.5,0", "4,0.1,0")
    rate_clip(tmp_path / "bob" / "one.csv", "0,0.2,0", "2,-0.9,0", "4,0.3,0")
    ratings, config = read_ratings(tmp_path), AgreeConfig(rate=2)
    agreement = compare_ratings(ratings, config)
    assert agreement.seconds == 3, "of 9 instants, the 3 between 1 s and 3 s are not rated by ann"
    labels = read_csv(fuse_ratings(ratings, agreement, config, tmp_path / "out")[0])
    assert labels.time is not None and labels.time.tolist() == [k / 2 for k in range(9)]
    assert np.isnan(labels.value[:, 0]).tolist() == [1 < k / 2 < 3 for k in range(9)]
    assert (tmp_path / "out" / "one.csv").read_text().splitlines()[1].startswith("0.000000,")


def test_pauses_without_rows_stay_unlabelled(tmp_path: Path) -> None:
    for name in ("ann", "bob"):  # as the viewer writes them: 20 rows a second, none between 1 s and 3 s
        times = [k / 20 for k in range(81) if not 20 < k < 60]
        rate_clip(tmp_path / name / "one.csv", *(f"{t},{t / 4},{-t / 4}" for t in times))
    ratings, config = read_ratings(tmp_path), AgreeConfig(rate=2)
    agreement = compare_ratings(ratings, config)
    assert agreement.seconds == 3, "of 9 instants, 3 are within the pause"
    labels = read_csv(fuse_ratings(ratings, agreement, config, tmp_path / "out")[0])
    assert np.isnan(labels.value[:, 0]).tolist() == [1 < k / 2 < 3 for k in range(9)]


def test_ratings_without_a_common_instant_are_not_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate_clip(tmp_path / "r" / "ann" / "one.csv", "0,0,0", "1,0.1,0")
    rate_clip(tmp_path / "r" / "bob" / "one.csv", "2,0,0", "3,0.1,0")
    assert main(["labels", "agree", str(tmp_path / "r")]) == 2
    assert "The ratings of one have no instant that all annotators rated" in capsys.readouterr().err
    for name in ("ann", "bob"):
        rate_clip(tmp_path / "r" / name / "two.csv", "0,0,0", "1,0.1,0.2")
    rate_clip(tmp_path / "r" / "ann" / "three.csv", "0,0,0", "1,0.1,0.2")
    ratings, config = read_ratings(tmp_path / "r"), AgreeConfig()
    written = fuse_ratings(ratings, compare_ratings(ratings, config), config, tmp_path / "out")
    assert [path.name for path in written] == ["three.csv", "two.csv"]
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["one", "three"]


def test_fused_labels_replace_only_fused_labels(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "labels"
    rate_clip(out / "one.csv", "0,0.5,0.5")
    before = (out / "one.csv").read_bytes()
    command = ["labels", "agree", str(root), "-q", "--out"]
    assert main([*command, str(out)]) == 2
    assert "holds tables that fused labels would replace. Got: one.csv." in capsys.readouterr().err
    assert (out / "one.csv").read_bytes() == before and not (out / "sub").exists()
    assert main([*command, str(root / "ann")]) == 2
    assert "is inside the ratings" in capsys.readouterr().err
    (out / "one.csv").unlink()
    assert main([*command, str(out)]) == main([*command, str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    for name in LAGS:
        (root / name / "one.csv").unlink()
    assert main([*command, str(out)]) == 0
    assert not (out / "one.csv").exists() and (out / "sub" / "two.csv").exists()


def test_an_interrupted_fusion_can_be_repeated(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings, config = read_ratings(root), AgreeConfig()
    agreement, write = compare_ratings(ratings, config), vaflow.viewer.ratings.write_file

    def interrupted(path: Path, data: bytes | str) -> None:
        if path.name == "two.csv":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(vaflow.viewer.ratings, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuse_ratings(ratings, agreement, config, tmp_path / "out")
    monkeypatch.undo()
    assert len(fuse_ratings(ratings, agreement, config, tmp_path / "out")) == 2
