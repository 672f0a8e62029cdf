"""`check_dataset` on a tree with every quirk, against the written facts."""

import json
import multiprocessing
import os
import signal
import time
from itertools import groupby
from pathlib import Path

import av
import numpy as np
import pytest
from affwild2_tree import Tree, build_affwild2, label_path, spoil_affwild2, write_video
from hypothesis import given
from hypothesis import strategies as st

from vaflow.datasets import Clip, Note, open_dataset
from vaflow.extract.doctor import Checked, Report, check_dataset, describe, document, occupancy
from vaflow.extract.doctor.facts import drift, label_stats, merge_stats, spans

RATE = 25


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return build_affwild2(tmp_path_factory.mktemp("affwild2"), seconds=1.6, rate=RATE)


@pytest.fixture(scope="module")
def report(tree: Tree) -> Report:
    return check_dataset(open_dataset(tree.root))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    tree = build_affwild2(tmp_path_factory.mktemp("spoiled"), seconds=1.6, rate=RATE)
    spoil_affwild2(tree)
    return check_dataset(open_dataset(tree.root))


def by_item(report: Report) -> dict[str, Checked]:
    return {checked.clip.id: checked for checked in report.checked}


def findings(report: Report, code: str, severity: str | None = None) -> dict[str, Note]:
    return {n.item: n for n in report.findings if n.code == code and severity in (None, n.severity)}


def write_table(path: Path, times: np.ndarray, values: np.ndarray) -> None:
    rows = [f"{t},{v},{a}" for t, (v, a) in zip(times, values, strict=True)]
    path.write_text("\n".join(["time,valence,arousal", *rows]))


# --- facts against the written tree


def test_clip_facts_list_frames_rows_and_crops(tree: Tree, report: Report) -> None:
    checked = by_item(report)
    for name, trial in tree.trials.items():
        facts = checked[name]
        assert facts.media is not None and facts.crops is not None
        assert facts.media.frames == trial.times.size
        assert facts.crops.missing == sum(k + 1 not in trial.crops for k in range(trial.times.size))
        assert facts.crops.found == len(trial.crops)
        assert (facts.labels is None) == (trial.labels is None)
        if trial.labels is not None and facts.labels is not None:
            assert facts.labels.rows == len(trial.labels)
            assert facts.labels.annotated == int((trial.labels[:, 0] != -5).sum())


def test_harmless_quirks_are_not_errors(report: Report) -> None:
    assert report.count("error") == 0
    assert set(findings(report, "crops-missing", "warning")) == {"video9"}
    assert report.count("warning") == 1


def test_small_row_count_differences_are_notes(report: Report) -> None:
    notes = findings(report, "row-count", "note")
    assert set(notes) == {"12-24-64x64", "video7"}
    assert "(+1)" in notes["12-24-64x64"].message and "(-3)" in notes["video7"].message


def test_a_large_row_count_difference_is_a_warning(spoiled: Report) -> None:
    assert set(findings(spoiled, "row-count", "warning")) == {"toolong"}


def test_minus_five_spans_are_counted_with_their_share(tree: Tree, report: Report) -> None:
    notes = findings(report, "unannotated")
    labels = tree.trials["video5_left"].labels
    assert set(notes) == {"video5_left"} and labels is not None
    missing = int((labels[:, 0] == -5).sum())
    assert f"{missing} of {len(labels)} rows ({missing / len(labels):.1%})" in notes["video5_left"].message
    assert "at the start, in the middle (1), at the end" in notes["video5_left"].message


def test_missing_crops_are_a_share_of_the_frames(tree: Tree, report: Report) -> None:
    assert set(findings(report, "crops-missing")) == {
        name for name, trial in tree.trials.items() if len(trial.crops) < trial.times.size
    }


def test_crops_are_counted_by_number_not_by_position(spoiled: Report) -> None:
    """Three files, one of them numbered 30 beyond the end: two frames are covered, not three."""
    crops = by_item(spoiled)["faraway"].crops
    assert crops is not None and crops.found == 3 and crops.beyond == 1
    media = by_item(spoiled)["faraway"].media
    assert media is not None and crops.missing == media.frames - 2 and crops.last == media.frames + 30
    assert "faraway" in findings(spoiled, "crops-beyond", "warning")


def test_a_variable_frame_rate_is_noted_and_a_constant_one_is_not(tree: Tree, report: Report) -> None:
    assert set(findings(report, "variable-rate")) == {"8-30-64x64"}
    times = tree.trials["8-30-64x64"].times
    step = (times[-1] - times[0]) / (len(times) - 1)
    worst = max(abs(time - (times[0] + k * step)) for k, time in enumerate(times))
    assert f"{worst:.2f} s" in findings(report, "variable-rate")["8-30-64x64"].message


def test_absent_and_short_audio_is_reported(tree: Tree, report: Report) -> None:
    assert set(findings(report, "no-audio")) == {
        name for name, trial in tree.trials.items() if trial.audio_seconds == 0
    }
    assert set(findings(report, "audio-partial")) == {"8-30-64x64"}


def test_short_clips_are_reported(tree: Tree) -> None:
    report = check_dataset(open_dataset(tree.root), window=1.0)
    assert set(findings(report, "short-clip")) == {"brief", "smile"}


def test_label_statistics_cover_all_annotated_rows(tree: Tree, report: Report) -> None:
    train = [trial.labels for trial in tree.trials.values() if trial.split == "train" and trial.labels is not None]
    values = np.concatenate(train)
    values = values[values[:, 0] != -5]
    stats = report.splits()["train"].stats
    for i, name in enumerate(("valence", "arousal")):
        row, column = describe(stats)[name], values[:, i]
        np.testing.assert_allclose(
            [row["mean"], row["std"], row["min"], row["max"]],
            [column.mean(), column.std(), column.min(), column.max()],
            atol=1e-6,
        )
    shares = np.zeros(9)
    for v, a in values.astype(np.float32):  # as in training: half-way between centers at 0 and 0.66
        shares[3 * sum(v > edge for edge in (-0.33, 0.33)) + sum(a > edge for edge in (-0.33, 0.33))] += 1
    np.testing.assert_allclose(occupancy(stats), shares / len(values))


def test_splits_add_up(tree: Tree, report: Report) -> None:
    splits, total = report.splits(), report.total()
    assert list(splits) == ["train", "val", "test", "none"]
    assert total.clips == len(tree.trials) == sum(split.clips for split in splits.values())
    assert total.frames == sum(trial.times.size for trial in tree.trials.values())
    assert splits["train"].groups == 4, "five trials of four videos"


# --- damaged files


def test_unusable_clips_are_errors_and_do_not_affect_the_rest(spoiled: Report, report: Report) -> None:
    errors = {note.item: note.code for note in spoiled.findings if note.severity == "error"}
    assert errors == {
        "novideo": "no-video",
        "text": "unreadable",
        "cut": "unreadable",
        "cutfront": "unreadable",
        "badlabels": "bad-labels",
        "video5": "leak",
    }
    assert spoiled.total().usable == spoiled.total().clips - 5, "all but the leak are left out"
    message = findings(spoiled, "bad-labels")["badlabels"].message
    assert "line 3 ('later')" in message and "line 4 ('7')" in message
    good, again = by_item(report), by_item(spoiled)
    for name in good:
        assert again[name].media == good[name].media and again[name].crops == good[name].crops


def test_one_video_in_two_splits_is_a_leak(spoiled: Report) -> None:
    message = findings(spoiled, "leak")["video5"].message
    assert "train: video5_left, video5_right" in message and "val: video5" in message


def test_clips_without_crops_among_clips_with_crops(spoiled: Report) -> None:
    notes = findings(spoiled, "no-crops", "warning")
    assert "badlabels" in notes and "solo_left" not in notes and "novideo" not in notes


def test_every_error_and_warning_states_a_remedy(spoiled: Report) -> None:
    assert all(note.message and note.remedy for note in spoiled.findings if note.severity != "note")


def test_real_clips_are_usable(clips: Path) -> None:
    report = check_dataset(open_dataset(clips))
    assert report.count("error") == 0 and report.total().usable == len(report.checked) > 0
    assert set(findings(report, "no-audio")) == {"carphone"}
    assert set(findings(report, "audio-partial")) == {"face_noface"}


# --- plain folders of videos


def videos(root: Path, *names: str, seconds: float = 0.8) -> None:
    for name in names:
        write_video(root / f"{name}.mp4", np.arange(round(seconds * RATE)) / RATE, seconds)


def test_an_unlabelled_dataset_is_accepted(tmp_path: Path) -> None:
    videos(tmp_path, "a")
    report = check_dataset(open_dataset(tmp_path))
    assert report.count("error") == report.count("warning") == 0
    assert findings(report, "no-labels-at-all")


def test_splits_without_clips_or_labels_are_reported(tmp_path: Path) -> None:
    videos(tmp_path, "a", "b", "c")
    write_table(tmp_path / "a.csv", np.arange(20) / RATE, label_path(20, 0))
    write_table(tmp_path / "c.csv", np.arange(20) / RATE, label_path(20, 1))
    (tmp_path / "splits.csv").write_text("name,split\na,train\nb,val\n")
    report = check_dataset(open_dataset(tmp_path))
    assert "'val'" in findings(report, "split-unlabelled")[""].message
    assert set(findings(report, "no-labels")) == {"b"}
    assert "c" in findings(report, "labels-without-split")[""].message
    (tmp_path / "splits.csv").write_text("name,split\na,train\nb,test\nc,train\n")
    report = check_dataset(open_dataset(tmp_path))
    assert "'val'" in findings(report, "split-empty")[""].message


def test_uninformative_labels_are_reported(tmp_path: Path) -> None:
    videos(tmp_path, "none", "half", "flat", "late")
    (tmp_path / "none.csv").write_text("frame,valence,arousal\n0,-5,-5\n1,,\n")
    (tmp_path / "half.csv").write_text("frame,valence,arousal\n0,-5,0.5\n1,0.1,0.2\n")
    (tmp_path / "flat.csv").write_text("frame,valence,arousal\n0,0.5,0.1\n1,0.5,0.2\n")
    (tmp_path / "late.csv").write_text("time,arousal\n0,0.5\n60,0.2\n")
    report = check_dataset(open_dataset(tmp_path))
    expected = {
        "nothing-annotated": "none",
        "half-annotated": "half",
        "constant-labels": "flat",
        "labels-outlast": "late",
    }
    for code, item in expected.items():
        assert set(findings(report, code)) == {item}, code
    assert "valence has one value" in findings(report, "constant-labels")["flat"].message


def test_audio_without_video_is_an_error(tmp_path: Path) -> None:
    videos(tmp_path, "good")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16384, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    report = check_dataset(open_dataset(tmp_path))
    assert set(findings(report, "unreadable", "error")) == {"sound"} and report.total().usable == 1


def _slow(clip: Clip, **_: object) -> Checked:
    """At module level, so that a spawned process can import it."""
    assert clip.video is not None
    with (clip.video.parent / "looked-at.txt").open("a") as file:
        file.write(f"{clip.id}\n")
    time.sleep(0.01)
    return Checked(clip, None, None, None, ())


def test_an_interrupt_cancels_pending_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        (tmp_path / f"{number}.mp4").touch()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vaflow.extract.doctor.check_clip", _slow)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(open_dataset(tmp_path), progress=interrupt)
    assert not multiprocessing.active_children()
    assert len((tmp_path / "looked-at.txt").read_text().splitlines()) < 250


def _die(clip: Clip, **_: object) -> Checked:
    if clip.id == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Checked(clip, None, None, None, ())


def test_a_decoder_crash_is_a_finding_of_one_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"{number}.mp4").touch()
    monkeypatch.setattr("vaflow.extract.doctor.check_clip", _die)
    report = check_dataset(open_dataset(tmp_path))
    assert [checked.clip.id for checked in report.checked] == ["0", "1", "2", "3"]
    (note,) = findings(report, "unreadable", "error").values()
    assert note.item == "1"
    assert "SIGSEGV" in note.message


# --- pure functions


@given(st.lists(st.booleans(), max_size=20))
def test_run_lengths_equal_groupby(flags: list[bool]) -> None:
    expected, position = [], 0
    for flag, group in groupby(flags):
        length = len(list(group))
        if flag:
            expected.append((position, position + length))
        position += length
    assert list(spans(np.array(flags, bool))) == expected


def test_drift_equals_the_error_of_index_over_rate() -> None:
    assert drift(np.arange(100) / 25) < 1e-12
    assert drift(np.array([0.0])) == 0
    freeze = np.concatenate([np.arange(50) / 25, 3 + np.arange(50) / 25])
    step = freeze[-1] / 99
    assert drift(freeze) == pytest.approx(max(abs(t - k * step) for k, t in enumerate(freeze)))


def test_merged_statistics_equal_statistics_of_all_rows() -> None:
    value = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    value[::7, 0] = np.nan
    whole, parts = label_stats(value), merge_stats([label_stats(value[:13]), label_stats(value[13:])])
    for name in vars(whole):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name))


def test_the_json_report_is_complete(tree: Tree, report: Report) -> None:
    plain = json.loads(json.dumps(document(report), allow_nan=False))
    assert set(plain["items"]) == set(tree.trials)
    assert plain["counts"] == {severity: report.count(severity) for severity in ("error", "warning", "note")}
    assert plain["items"]["video5_left"]["labels"]["unannotated_runs"][0] == [0, 3]
    assert len(plain["findings"]) == len(report.findings)
