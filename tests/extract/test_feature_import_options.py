"""Options of `vaflow cache import`: groups, label formats, column roles, number range, normalisation per group."""

import logging
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, open_cache
from vaflow.cache.schema import LABELS
from vaflow.errors import UsageError
from vaflow.extract.importing import ImportConfig, ImportSummary, import_features
from vaflow.extract.importing.feature_files import Columns

RNG = np.random.default_rng(0)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def save(tmp: Path, *items: str, rows: int = 6, scale: float = 1.0) -> None:
    for item in items:
        path = tmp / "from" / f"{item}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, RNG.normal(size=(rows, 3)) * scale)


def bring(tmp: Path, *, labels: bool = True, **options: object) -> ImportSummary:
    config = ImportConfig("mine", "visual", **({"rate": 2.0} | options))  # type: ignore[arg-type]
    return import_features(tmp / "cache", tmp / "from", config, labels=tmp / "labels" if labels else None)


def cached(tmp: Path) -> Cache:
    return open_cache(tmp / "cache")


# --- groups


def test_two_people_of_one_video_share_a_group(tmp_path: Path) -> None:
    save(tmp_path, "v1_left", "v1_right", "sub/v2", "_left")
    bring(tmp_path, labels=False)
    groups = {item: cached(tmp_path).meta(item)["group"] for item in cached(tmp_path).items()}
    assert groups == {"v1_left": "v1", "v1_right": "v1", "sub/v2": "sub/v2", "_left": "_left"}


def test_the_split_list_sets_groups_and_other_columns_raise_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "a", "b", "c")
    write(tmp_path / "from" / "splits.csv", "name,split,group,site", "a,train,ann,x", "b,train,ann,y", "c,val,bob,x")
    bring(tmp_path, labels=False)
    assert [cached(tmp_path).meta(item)["group"] for item in "abc"] == ["ann", "ann", "bob"]
    assert "site" in caplog.text
    write(tmp_path / "from" / "splits.csv", "name,split,group", "a,train,ann", "b,train,eve", "c,val,bob")
    assert bring(tmp_path, labels=False).labelled == 1
    assert cached(tmp_path).meta("b")["group"] == "eve"


# --- labels


def test_labels_matching_no_item_are_an_error_before_writing(tmp_path: Path) -> None:
    save(tmp_path, "a", "b")
    for k in range(20):
        write(tmp_path / "labels" / f"other{k}.csv", "time,valence", "0,0.5")
    with pytest.raises(UsageError, match=r"No label file .* fits an item.*other0\.csv.* and 15 more"):
        bring(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_challenge_labels_count_feature_rows_or_frames(tmp_path: Path) -> None:
    save(tmp_path, "a")
    write(tmp_path / "labels" / "a.txt", "valence,arousal", "0.5,-0.5", "-5,-5", "0.25,1")
    summary = bring(tmp_path)
    assert (summary.annotated, summary.label_rows) == (1, 3)
    labels = cached(tmp_path).read(LABELS, "a")
    assert (
        labels.time.tolist()[:3] == [0, 0.5, 1.0] and labels.valid[:, 0].tolist() == [True, False, True] + [False] * 3
    )
    assert bring(tmp_path, label_rate=25.0).labelled == 1, "another rate is another clock"
    assert cached(tmp_path).read(LABELS, "a").time.tolist() == [0, 0.04, 0.08]


def test_label_columns_can_be_renamed(tmp_path: Path) -> None:
    save(tmp_path, "a")
    write(tmp_path / "labels" / "a.csv", "Zeit;V_gold;A_gold;note", "0,0;0,5;-0,25;x", "0,5;-5;0,125;y")
    bring(tmp_path, columns=Columns.parse(["time=Zeit", "valence=v_gold", "arousal=a_gold"]))
    labels = cached(tmp_path).read(LABELS, "a")
    assert labels.time.tolist() == [0, 0.5] and labels.value[0].tolist() == [0.5, -0.25]
    assert labels.valid.tolist() == [[True, True], [False, True]]


def test_span_labels_apply_to_the_rows_inside(tmp_path: Path) -> None:
    save(tmp_path, "a")  # rows at 0, 0.5, ... 2.5 s
    write(tmp_path / "labels" / "a.csv", "from,to,valence", "0.5,1.5,0.5", "2.0,9,-0.5")
    bring(tmp_path, columns=Columns.parse(["start=from", "end=to"]))
    labels = cached(tmp_path).read(LABELS, "a")
    expected = [np.nan, 0.5, 0.5, np.nan, -0.5, -0.5]
    np.testing.assert_array_equal(labels.value[:, 0], np.array(expected, np.float32))
    write(tmp_path / "labels" / "a.csv", "start,end,valence", "1,1,0.5")
    [failure] = bring(tmp_path).failures
    assert "end is not after start: line 2" in failure.message


def test_names_that_no_prediction_can_have_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "a", "b\\c")
    assert bring(tmp_path, labels=False).imported == 1
    assert "names with a backslash or not in UTF-8: 'b\\\\c.npy'" in caplog.text


def test_failures_after_the_tenth_are_only_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, *(f"item{k:02}" for k in range(40)), rows=0)
    with caplog.at_level(logging.WARNING):
        summary = bring(tmp_path, labels=False)
    assert len(summary.failures) == 40 and len(caplog.records) == 11
    assert "30 more failures" in caplog.text


# --- feature tables


@pytest.mark.parametrize(
    "lines",
    [
        ["name;frameTime;energy;f0", "a;0,5;1,5;2", "a;1,0;-1;3e-1"],
        ["file,start,end,energy,f0", "a,0,1,1.5,2", "a,0.5,1.5,-1,0.3"],
        ["file,start,end,energy,f0", "a,0 days 00:00:00,0 days 00:00:01,1.5,2", "a,00:00:00.5,0:00:01.5,-1,0.3"],
        ["name\tTime\tenergy\tf0", "a\t0,5\t1,5\t2", "a\t1\t-1\t0.3"],
    ],
)
def test_feature_tables_of_other_programs_are_read(tmp_path: Path, lines: list[str]) -> None:
    write(tmp_path / "from" / "a.csv", *lines)
    columns = Columns.parse(["time=frameTime", "ignore=name,file"])
    assert bring(tmp_path, labels=False, rate=None, columns=columns, dtype="float32").failures == []
    stored = cached(tmp_path).read("mine", "a")
    assert stored.time.tolist() == [0.5, 1.0]
    np.testing.assert_array_equal(stored.embedding, np.array([[1.5, 2], [-1, 0.3]], np.float32))


def test_a_text_column_error_states_how_to_exclude_it(tmp_path: Path) -> None:
    write(tmp_path / "from" / "a.csv", "time,speaker,f0", "0,ann,1")
    [failure] = bring(tmp_path, labels=False, rate=None).failures
    assert "--columns ignore=NAME" in failure.message


@pytest.mark.parametrize("pair", ["time", "when=t", "=t", "time="])
def test_invalid_column_roles_are_rejected(pair: str) -> None:
    with pytest.raises(UsageError, match="ROLE=NAME"):
        Columns.parse([pair])


def test_a_column_has_one_role() -> None:
    with pytest.raises(UsageError, match="two roles"):
        Columns.parse(["time=t", "start=T"])


# --- range and normalisation


def test_out_of_range_numbers_are_rejected_before_writing(tmp_path: Path) -> None:
    save(tmp_path, "a", "b")
    save(tmp_path, "z", scale=1e6)
    with pytest.raises(UsageError, match=r"float16 cannot hold the features of z.*--dtype float32") as caught:
        bring(tmp_path, labels=False)
    assert f"{tmp_path / 'cache'}-float32" in str(caught.value) and not (tmp_path / "cache").exists()
    assert bring(tmp_path, labels=False, dtype="float32").imported == 3


def test_the_command_for_other_numbers_has_all_options(tmp_path: Path) -> None:
    save(tmp_path, "z", scale=1e6)
    write(tmp_path / "labels" / "z.csv", "t,valence", "0,0.5")
    with pytest.raises(UsageError) as caught:
        bring(tmp_path, columns=Columns.parse(["time=t"]), label_rate=29.97002997)
    options = f"--labels {tmp_path / 'labels'} --rate 2.0 --label-rate 29.97002997 --columns time=t --dtype float32"
    assert options in str(caught.value)


def test_out_of_range_numbers_of_a_changed_file_are_rejected_before_writing(tmp_path: Path) -> None:
    save(tmp_path, "a", "b")
    bring(tmp_path, labels=False)
    save(tmp_path, "b", scale=1e6, rows=7)
    with pytest.raises(UsageError, match=r"float16 cannot hold the features of b"):
        bring(tmp_path, labels=False)
    assert len(cached(tmp_path).read("mine", "b").time) == 6


def test_features_become_z_scores_within_each_speaker(tmp_path: Path) -> None:
    save(tmp_path, "a1", "a2", scale=100.0)
    save(tmp_path, "b1", scale=1e7)
    speakers = ["name,split,speaker", "a1,train,ann", "a2,val,ann", "b1,val,bob"]
    write(tmp_path / "from" / "splits.csv", *speakers)
    raw = {item: np.load(tmp_path / "from" / f"{item}.npy") for item in ("a1", "a2", "b1")}
    assert bring(tmp_path, labels=False, normalize_by="speaker").imported == 3
    for items in (["a1", "a2"], ["b1"]):
        both = np.concatenate([raw[item] for item in items])
        for item in items:
            expected = (raw[item] - both.mean(0)) / both.std(0)
            np.testing.assert_allclose(cached(tmp_path).read("mine", item).embedding, expected, atol=2e-3)
    assert bring(tmp_path, labels=False, normalize_by="speaker").done == 3
    save(tmp_path, "a3")
    write(tmp_path / "from" / "splits.csv", *speakers, "a3,train,ann")
    summary = bring(tmp_path, labels=False, normalize_by="speaker")
    assert (summary.imported, summary.changed, summary.done) == (3, 2, 1), "the group's statistics have changed"


@pytest.mark.parametrize(
    ("column", "part"), [("language", "no such column .*group, item, speaker"), ("speaker", "lacks cells .*none for b")]
)
def test_normalisation_requires_a_group_for_every_item(tmp_path: Path, column: str, part: str) -> None:
    save(tmp_path, "a", "b")
    write(tmp_path / "from" / "splits.csv", "name,split,speaker", "a,train,ann", "b,val,")
    with pytest.raises(UsageError, match=part):
        bring(tmp_path, labels=False, normalize_by=column)


def test_each_item_can_be_normalised_separately(tmp_path: Path) -> None:
    save(tmp_path, "a", "b", scale=50.0)
    bring(tmp_path, labels=False, normalize_by="item", dtype="float32")
    for item in "ab":
        embedding = cached(tmp_path).read("mine", item).embedding
        np.testing.assert_allclose(embedding.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(embedding.std(0), 1, atol=1e-6)
