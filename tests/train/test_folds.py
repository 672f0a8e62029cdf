"""Cross-validation: every clip in one fold, source videos kept together, deterministic folds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.errors import UsageError
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.folds import make_folds, source_splits, split_items, with_folds
from vaflow.train.run_folder import RunFolder, require_record
from vaflow.train.scores import failed_items
from vaflow.train.train_run import train_run

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=3e-3, batch_size=8, epochs=1, device="cpu", folds=3)
BOTH = ("train", "val")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """Nine videos, of which three show a second person."""
    cache = make_cache(tmp_path_factory.mktemp("folds") / "cache", Toy(seconds=(6, 30)))
    for item in ("train0", "train3", "val1"):
        for stream in cache.streams():
            if cache.has(stream, item):
                twin = cache.read(stream, item)
                meta = {**twin.meta, "group": item} if stream == LABELS else twin.meta
                cache.write(stream, f"{item}_left", twin.arrays, meta=meta)
    return cache


def labelled(cache: Cache, items) -> int:
    return sum(int(cache.read(LABELS, item).valid.any(axis=1).sum()) for item in items)


@pytest.mark.parametrize("folds", [2, 3, 5, 9])
def test_every_clip_is_in_one_fold_and_no_video_in_two(cache: Cache, folds: int) -> None:
    parts = make_folds(cache, BOTH, folds)
    assert len(parts) == folds
    assert sorted(item for part in parts for item in part.items) == cache.items()
    for item in ("train0", "train3", "val1"):
        [home] = [part for part in parts if item in part.items]
        assert f"{item}_left" in home.items
    groups = [group for part in parts for group in part.groups]
    assert len(groups) == len(set(groups)) == 9
    for part in parts:
        assert part.labelled == labelled(cache, part.items)
        assert {cache.meta(item)["group"] for item in part.items} == set(part.groups)


def test_folds_have_similar_numbers_of_labelled_frames(cache: Cache) -> None:
    parts = make_folds(cache, BOTH, 3)
    videos: dict[str, int] = {}
    for item in cache.items():
        group = cache.meta(item)["group"]
        videos[group] = videos.get(group, 0) + labelled(cache, [item])
    sizes = [part.labelled for part in parts]
    assert max(sizes) - min(sizes) <= max(videos.values())  # bound of assigning the largest first
    assert make_folds(cache, BOTH, 3) == parts


def test_folds_have_names_usable_as_splits(cache: Cache) -> None:
    parts = make_folds(cache, BOTH, 3)
    for k, part in enumerate(parts, 1):
        fold_items, rest = split_items(cache, f"fold{k}of3", BOTH), split_items(cache, f"rest{k}of3", BOTH)
        assert fold_items == list(part.items)
        assert sorted(fold_items + rest) == cache.items()
    assert split_items(cache, "val", BOTH) == cache.items(split="val")
    assert split_items(cache, "fold1of2", ("train",)) == list(make_folds(cache, ("train",), 2)[0].items)
    assert source_splits("fold1of2", BOTH) == BOTH and source_splits("val", BOTH) == ("val",)
    with pytest.raises(UsageError, match="1 to 3"):
        split_items(cache, "fold4of3", BOTH)
    with pytest.raises(UsageError, match="Choices: train, val"):
        split_items(cache, "fold4", BOTH)


def test_impossible_fold_counts_are_rejected(cache: Cache) -> None:
    with pytest.raises(UsageError, match="9 source videos"):
        make_folds(cache, BOTH, 10)
    with pytest.raises(UsageError, match="must be >= 2"):
        TrainConfig(folds=1)
    with pytest.raises(UsageError, match="between 1 and --folds 3"):
        TrainConfig(folds=3, fold=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"folds": 0, "fold": 2}, "--fold 2 requires --folds"), ({"val_split": "test"}, "--folds excludes val_split")],
)
def test_a_fold_without_effect_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_folds(replace(CONFIG, **settings))
    assert with_folds(replace(with_folds(CONFIG), fold=2)).val_split == "fold2of3"


def test_a_run_validates_on_its_fold_and_trains_on_the_rest(cache: Cache, tmp_path: Path) -> None:
    parts = make_folds(cache, BOTH, 3)
    result = train_run(cache, replace(CONFIG, fold=2), tmp_path / "run", tensorboard=False, figures=False)
    assert result.metrics["split"] == "fold2of3"
    written = {path.stem for path in RunFolder(tmp_path / "run").predictions("fold2of3").glob("*.csv")}
    assert written == set(parts[1].items)
    data = require_record(tmp_path / "run").data
    assert data["fold2of3"]["labelled_frames"] == parts[1].labelled
    assert data["rest2of3"]["clips"] == len(parts[0].items) + len(parts[2].items)
    assert evaluate_run(tmp_path / "run", cache, device="cpu", write=False)["ccc"] == result.metrics["ccc"]
    again = train_run(cache, replace(CONFIG, fold=2), tmp_path / "run", tensorboard=False, figures=False)
    assert again.was_done
    other = evaluate_run(tmp_path / "run", cache, "fold1of3", device="cpu", write=False)
    assert other["n_clips"] == len(parts[0].items)


def test_a_run_on_folds_of_groups_is_bound_to_its_clips(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "old" / "groups.csv"
    table.parent.mkdir()

    def write_groups(speakers: int) -> None:
        videos = sorted({str(cache.meta(item).get("group") or item) for item in cache.items()})
        rows = [f"{video},{k % speakers}" for k, video in enumerate(videos)]
        table.write_text("\n".join(["item,speaker", *rows]) + "\n")

    config, run = replace(CONFIG, folds=2, fold_groups="groups.csv:speaker"), tmp_path / "old" / "run"
    write_groups(2)
    monkeypatch.chdir(table.parent)
    train_run(cache, config, run, tensorboard=False, figures=False)
    monkeypatch.chdir(tmp_path)  # another working directory
    config = replace(config, fold_groups="old/groups.csv:speaker")
    assert train_run(cache, config, run, tensorboard=False, figures=False).was_done
    clips = RunFolder(run).read_clips()
    assert clips is not None
    assert set(clips["fold1of2"]) == {path.stem for path in RunFolder(run).predictions("fold1of2").glob("*.csv")}
    assert not evaluate_run(run, cache, device="cpu", write=False)["warnings"]
    write_groups(4)
    with pytest.raises(UsageError, match="does not hold the clips"):
        train_run(cache, replace(config, epochs=2), run, tensorboard=False, figures=False)
    table.parent.rename(tmp_path / "new")
    assert require_record(tmp_path / "new/run").config.fold_groups == f"{tmp_path / 'new' / 'groups.csv'}:speaker"


def test_failed_clips_count_in_every_fold_of_their_split(cache: Cache) -> None:
    path = cache.path / "failures.jsonl"
    path.write_text('{"item": "lost", "split": "val"}\n{"item": "other", "split": "test"}\n')
    try:
        assert failed_items(cache, "fold1of3", BOTH) == ["lost"]
        assert failed_items(cache, "fold1of3", ("train",)) == []
        assert failed_items(cache, "val", BOTH) == ["lost"]
    finally:
        path.unlink()
