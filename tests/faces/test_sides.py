"""`_left` and `_right` trials of Aff-Wild2 without crops follow their person or fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from affwild2_tree import write_labels
from composites import in_a_row, one_after_another, write

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.datasets import open_dataset
from vaflow.encoders.base import VisualEncoder
from vaflow.extract.config import ExtractConfig
from vaflow.extract.doctor import check_dataset
from vaflow.extract.pipeline import extract_with


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Two videos with a left and a right trial each, and no crops; the second one shows one person at a time."""
    root = tmp_path_factory.mktemp("affwild2")
    (root / "videos").mkdir()
    write(root / "videos" / "pair.mp4", in_a_row(clips, "wolfgang", "obama"), 6)
    write(root / "videos" / "turns.mp4", one_after_another(clips, ("wolfgang", 3), ("obama", 3)), 6)
    labels = root / "VA_Estimation_Challenge" / "Train_Set"
    labels.mkdir(parents=True)
    for seed, name in enumerate(("pair_left", "pair_right", "turns_left", "turns_right")):
        write_labels(labels / f"{name}.txt", np.random.default_rng(seed).uniform(-0.9, 0.9, (60, 2)))
    return root


def test_sides_differ_and_follow_their_person(trials: Path, tmp_path: Path, tiny_clip: VisualEncoder) -> None:
    config = ExtractConfig(visual=("clip-tiny",), audio=(), device="cpu", workers=1)
    summary = extract_with(open_dataset(trials), tmp_path / "cache", config, [tiny_clip], [], torch.device("cpu"))
    assert sorted(failure.item for failure in summary.failures) == ["turns_left", "turns_right"]
    assert all("cannot be told apart" in failure.message for failure in summary.failures)
    cache = open_cache(tmp_path / "cache")
    left, right = (cache.read("clip-tiny", f"pair_{side}") for side in ("left", "right"))
    assert left.valid.all() and right.valid.all()
    assert not (left.embedding == right.embedding).all(axis=1).any()
    for side in ("left", "right"):
        everyone = cache.read("faces", f"pair_{side}")
        person = cache.record("clip-tiny", f"pair_{side}").meta["person"]
        middles = everyone.box[everyone.person == person][:, [0, 2]].mean(axis=1)
        assert ((middles < 320) == (side == "left")).all()


def test_check_names_trials_without_crops(trials: Path) -> None:
    findings = [note for note in check_dataset(open_dataset(trials)).findings if note.code == "same-features"]
    assert not findings, "the sides differ"
    dataset = open_dataset(trials)
    copies = replace(dataset, clips=tuple(replace(clip, side="") for clip in dataset.clips))
    notes = {note.item: note for note in check_dataset(copies).findings if note.code == "same-features"}
    assert set(notes) == {"pair_left", "pair_right", "turns_left", "turns_right"}
    assert notes["pair_left"].severity == "error"
    assert "pair_right" in notes["pair_left"].message


@pytest.mark.slow  # test_cache_people compares other choices
def test_another_choice_of_people_keeps_the_sides(trials: Path, tmp_path: Path) -> None:
    options = ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu", "-q"]
    assert main(["extract", str(trials), "--out", str(tmp_path / "cache"), *options]) == 3
    assert main(["cache", "people", str(tmp_path / "cache"), str(tmp_path / "out"), "--person", "id:1", "-q"]) == 0
    cache, chosen = open_cache(tmp_path / "cache"), open_cache(tmp_path / "out")
    assert chosen.items() == ["pair_left", "pair_right"]
    for item in chosen.items():
        np.testing.assert_array_equal(chosen.read("clip-tiny", item).embedding, cache.read("clip-tiny", item).embedding)
