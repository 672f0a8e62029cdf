"""Every finding of `vaflow check`, on a small tree with exactly that fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import label_path, write_crops, write_labels, write_video
from make_media import AudioTrack, VideoTrack, tones, write_media

from vaflow.cache import create_cache
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.datasets import Clip, Note, open_dataset
from vaflow.extract.doctor import SAMPLE, Report, check_clip, check_dataset, document, same_content
from vaflow.extract.doctor.facts import BINS, CELLS, coverage, crop_facts, label_stats
from vaflow.extract.doctor.findings import COSTS, constant_scores, shift_loss
from vaflow.extract.source_files import file_identity
from vaflow.train.metrics import region_occupancy

EVEN = tuple(range(0, 1600, 40))


def check(root: Path) -> Report:
    return check_dataset(open_dataset(root))


def notes_of(report: Report, code: str) -> dict[str, Note]:
    return {note.item: note for note in report.findings if note.code == code}


def one(root: Path, name: str = "clip.mp4", **parts: object) -> Report:
    root.mkdir(parents=True, exist_ok=True)
    write_media(root / name, **{"video_track": VideoTrack(EVEN), **parts})  # type: ignore[arg-type]
    return check(root)


# --- audio and frame


@pytest.mark.parametrize(
    ("audio_track", "code", "status"),
    [
        (None, "no-audio", "none"),
        (AudioTrack(np.zeros((1, 70560))), "audio-silent", "silent"),
        (AudioTrack(tones(0.7, 44100)), "audio-partial", "partial"),
        (AudioTrack(tones(1.6, 44100)), None, "whole"),
    ],
)
def test_audio_status_is_reported(
    tmp_path: Path, audio_track: AudioTrack | None, code: str | None, status: str
) -> None:
    report = one(tmp_path, audio_track=audio_track)
    codes = {note.code for note in report.findings if "audio" in note.code}
    media = report.checked[0].media
    assert codes == ({code} if code else set()) and media is not None and media.audio == status


def test_audio_after_a_long_silence_is_complete(tmp_path: Path) -> None:
    samples = np.concatenate([np.zeros((1, 60000)), tones(0.24, 44100)], axis=1)
    media = one(tmp_path, audio_track=AudioTrack(samples)).checked[0].media
    assert media is not None and media.audio == "whole"


@pytest.mark.parametrize(("seconds", "codes"), [(1.7, []), (4, ["audio-outlasts"]), (0.5, ["audio-partial"])])
def test_a_separate_audio_file_of_another_length_is_noted(tmp_path: Path, seconds: float, codes: list[str]) -> None:
    video = write_media(tmp_path / "clip.mp4", VideoTrack(EVEN), None)
    audio = write_media(tmp_path / "clip.wav", None, AudioTrack(tones(seconds, 44100)))
    findings = check_clip(Clip("clip", None, "clip", video, audio)).findings
    notes = [note for note in findings if "audio" in note.code]
    assert [note.code for note in notes] == codes
    if seconds == 4:
        assert "The separate audio file ends at 4.02 s, the video at 1.60 s" in notes[0].message


def test_undecodable_audio_is_a_warning(tmp_path: Path) -> None:
    path = write_media(tmp_path / "clip.mkv", VideoTrack(EVEN), AudioTrack(tones(1.6, 44100), codec="flac"))
    data = path.read_bytes().replace(b"\xff\xf8", b"\x01\x01")  # sync code of FLAC frames
    path.write_bytes(data)
    report = check(tmp_path)
    assert notes_of(report, "audio-unreadable")["clip"].severity == "warning"
    assert report.count("error") == 0


def test_a_frozen_video_is_noted(tmp_path: Path) -> None:
    times = (*EVEN[:20], *(time + 1500 for time in EVEN[20:]))
    note = notes_of(one(tmp_path, video_track=VideoTrack(times)), "picture-gap")["clip"]
    assert f"{(times[20] - times[19]) / 1000:.2f} s" in note.message


def test_a_wrong_frame_rate_in_the_header_is_noted(tmp_path: Path) -> None:
    """Every second frame is dropped evenly: 25 frames/s in the header is wrong, and no frame is off the average."""
    report = one(tmp_path, "clip.avi", video_track=VideoTrack(EVEN[::2], codec="mpeg4", rate=25))
    media = report.checked[0].media
    assert media is not None and media.nominal_rate == 25 and media.average_rate == pytest.approx(12.5)
    assert set(notes_of(report, "rate-claim")) == {"clip"} and not notes_of(report, "variable-rate")


def test_a_variable_rate_finding_states_the_error_of_index_over_rate(tmp_path: Path) -> None:
    times = (*EVEN[:20], *(time + 2000 for time in EVEN[20:]))
    note = notes_of(one(tmp_path, video_track=VideoTrack(times)), "variable-rate")["clip"]
    seconds = np.array(times) / 1000
    drift = np.abs(seconds - np.linspace(seconds[0], seconds[-1], len(seconds))).max()
    valence = float(np.interp(drift, [0, 0.5, 1], [0, 1 - 0.941, 1 - 0.879]))
    arousal = float(np.interp(drift, [0, 0.5, 1], [0, 1 - 0.888, 1 - 0.788]))
    assert f"{valence:.2f} (valence) and {arousal:.2f} (arousal)" in note.message


def test_the_reported_cost_of_a_shift_equals_a_measurement() -> None:
    for frames, scores in ((15, (0.941, 0.888)), (30, (0.879, 0.788)), (300, (0.879, 0.788))):
        np.testing.assert_allclose(shift_loss(frames / 30), 1 - np.array(scores), atol=1e-9)
    assert shift_loss(0) == (0, 0) == shift_loss(-1)


# --- crops


def test_crops_that_are_not_images_are_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "crops"
    write_crops(folder, tuple(range(1, 21)))
    assert crop_facts([folder], np.arange(20) / 25).damaged == ()
    (folder / "00001.jpg").write_bytes(b"")
    (folder / "00020.jpg").write_bytes(b"no picture")
    assert crop_facts([folder], np.arange(20) / 25).damaged == ("00001.jpg", "00020.jpg")


def test_crop_coverage_equals_a_loop(tmp_path: Path) -> None:
    numbers = tuple(k + 1 for k in range(50) if k not in (3, 4, 5, 20))
    write_crops(tmp_path, numbers)
    facts = crop_facts([tmp_path], np.arange(50) / 25)
    longest = run = 0
    for k in range(50):
        run = 0 if k + 1 in numbers else run + 1
        longest = max(longest, run)
    assert (facts.found, facts.missing, facts.longest) == (46, 4, longest)
    for k, level in enumerate(facts.coverage):
        begins = [frame for frame in range(50) if int(frame / 25 * BINS / 2) == k]
        frame = (
            begins[0] if begins else int((k + 0.5) * 50 / BINS)
        )  # 240 parts of 50 frames: at most one begins in each
        assert level == (255 if frame + 1 in numbers else 0), k


def test_strips_show_the_share_per_bin() -> None:
    flags = np.random.default_rng(0).random(BINS * 7) < 0.5
    times = (np.arange(flags.size) + 0.5) / 30
    levels = np.frombuffer(coverage(times, flags, flags.size / 30), np.uint8)
    np.testing.assert_array_equal(levels, np.rint(flags.reshape(BINS, 7).mean(1) * 255))


# --- duplicate content


def test_duplicate_detection_equals_comparing_all_bytes(tmp_path: Path) -> None:
    """Equal-sized files that differ only between the sampled blocks, a copy, a symlink, empty and missing files."""
    random = np.random.default_rng(0)
    big = bytearray(random.bytes(8 * SAMPLE))
    files = {"a": bytes(big), "copy": bytes(big), "small": b"x", "x": b"x", "empty": b"", "none": b""}
    big[SAMPLE * 2] ^= 1
    files["almost"] = bytes(big)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    paths = [*tmp_path.iterdir(), tmp_path / "gone"]
    contents: dict[bytes, list[Path]] = {}
    for path in paths:
        if path.exists() and path.stat().st_size:
            contents.setdefault(path.read_bytes(), []).append(path)
    assert same_content(paths) == sorted(tuple(sorted(group)) for group in contents.values() if len(group) > 1)


def test_duplicate_detection_skips_files_of_different_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(1, 20):
        (tmp_path / str(k)).write_bytes(b"x" * k)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    paths = list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "open", refuse)
    assert same_content(paths) == []


def three_videos(root: Path) -> None:
    for name in ("first", "second", "third"):
        write_video(root / f"{name}.mp4", np.arange(20) / 25, 0.8)
    shutil.copy(root / "first.mp4", root / "again.mp4")


def test_the_same_content_in_two_splits_is_an_error(tmp_path: Path) -> None:
    three_videos(tmp_path)
    (tmp_path / "splits.csv").write_text("name,split\nfirst,train\nagain,val\nsecond,train\nthird,val\n")
    notes = notes_of(check(tmp_path), "duplicate-across-splits")
    assert set(notes) == {"first", "again"} and notes["first"].severity == "error"
    assert "again (val)" in notes["first"].message and "'train'" in notes["first"].message


def test_the_same_content_in_one_split_is_a_warning(tmp_path: Path) -> None:
    three_videos(tmp_path)
    report = check(tmp_path)
    assert set(notes_of(report, "duplicate")) == {"first", "again"} and report.count("error") == 0


def test_left_and_right_of_one_video_are_not_duplicates(tmp_path: Path) -> None:
    write_video(tmp_path / "raw_videos" / "talk.mp4", np.arange(20) / 25, 0.8)
    for seed, side in enumerate(("left", "right")):
        write_labels(tmp_path / f"VA_Set/Train_Set/talk_{side}.txt", label_path(20, seed))
    codes = {note.code for note in check(tmp_path).findings}
    assert not codes & {"duplicate", "duplicate-across-splits", "same-labels", "leak"}


def test_one_annotation_for_two_clips_is_a_warning(tmp_path: Path) -> None:
    three_videos(tmp_path)
    (tmp_path / "again.mp4").unlink()
    for name in ("first", "second"):
        (tmp_path / f"{name}.csv").write_text("frame,valence,arousal\n0,0.5,0.1\n1,0.25,0.2\n")
    (tmp_path / "third.csv").write_text("frame,valence,arousal\n0,0.5,0.1\n1,0.25,0.3\n")
    assert set(notes_of(check(tmp_path), "same-labels")) == {"first", "second"}


@pytest.mark.parametrize("others", [0, 3])
def test_one_name_in_two_splits_is_a_warning(tmp_path: Path, others: int) -> None:
    """Equal file names such as `face.mp4` in each split are not reported."""
    rows = []
    for split in ("train", "val"):
        for k in range(1 + others):
            write_video(tmp_path / split / str(k) / "face.mp4", np.arange(14 + 2 * k + (split == "val")) / 25, 0.8)
            rows.append(f"{split}/{k}/face,{split}")
    (tmp_path / "splits.csv").write_text("\n".join(["name,split", *rows]))
    expected = {"train/0/face", "val/0/face"} if not others else set()
    assert set(notes_of(check(tmp_path), "same-name")) == expected


# --- labels of the whole dataset


def test_the_score_of_a_constant_per_clip_equals_the_formula() -> None:
    random = np.random.default_rng(0)
    clips = [random.normal(middle, 0.2, (count, 2)) for middle, count in ((-0.5, 40), (0.1, 10), (0.6, 70))]
    labels = np.concatenate(clips)
    constant = np.concatenate([np.broadcast_to(clip.mean(0), clip.shape) for clip in clips])
    covariance = ((labels - labels.mean(0)) * (constant - constant.mean(0))).mean(0)
    expected = 2 * covariance / (labels.var(0) + constant.var(0) + (labels.mean(0) - constant.mean(0)) ** 2)
    np.testing.assert_allclose(constant_scores([label_stats(clip) for clip in clips]), expected)
    assert np.isnan(constant_scores([label_stats(np.full((5, 2), 0.3))])).all()


def test_the_label_map_counts_every_frame() -> None:
    value = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    value[:5] = np.array([[-1, -1], [1, 1], [1 / 3, -1 / 3], [0.33, -0.33], [0, np.nan]])
    expected = np.zeros((CELLS, CELLS), int)
    edges = np.linspace(-1, 1, CELLS + 1)
    for v, a in value[np.isfinite(value).all(1)]:
        row, column = (min(int(np.searchsorted(edges, x + 1e-12, "right")) - 1, CELLS - 1) for x in (v, a))
        expected[row, column] += 1
    stats = label_stats(value)
    np.testing.assert_array_equal(stats.density, expected)
    shares = region_occupancy(np.nan_to_num(value), np.isfinite(value))
    np.testing.assert_allclose(stats.regions / stats.regions.sum(), shares)  # as `vaflow train` prints them


@pytest.mark.parametrize(("rate", "differs"), [(25, False), (10, True)])
def test_columns_frame_and_time_that_contradict_each_other_are_a_warning(
    tmp_path: Path, rate: int, differs: bool
) -> None:
    text = "".join(f"{k},{k / rate},0.1,0.2\n" for k in range(20))
    (tmp_path / "clip.csv").write_text("frame,time,valence,arousal\n" + text)
    notes = notes_of(one(tmp_path, video_track=VideoTrack(tuple(range(0, 800, 40)))), "two-clocks")
    assert bool(notes) == differs
    if differs:
        assert "differ by up to 1.14 s; frame is used" in notes["clip"].message


def labelled(root: Path, values: dict[str, tuple[str, list[tuple[float, float]]]]) -> Report:
    """Clips with a split and constant-rate labels each."""
    for name, (_, rows) in values.items():
        write_video(root / f"{name}.mp4", np.arange(20) / 25, 0.8)
        text = "".join(f"{k},{v},{a}\n" for k, (v, a) in enumerate(rows))
        (root / f"{name}.csv").write_text("frame,valence,arousal\n" + text)
    splits = [f"{name},{split}" for name, (split, _) in values.items()]
    (root / "splits.csv").write_text("\n".join(["name,split", *splits]))
    return check(root)


def test_regions_missing_from_training_are_reported(tmp_path: Path) -> None:
    report = labelled(
        tmp_path,
        {
            "a": ("train", [(0.0, 0.1), (0.9, 0.8)] * 5),
            "b": ("val", [(0.0, 0.0), (-0.9, -0.8)] * 5),
        },
    )
    assert "7 of nine regions" in notes_of(report, "rare-regions")[""].message
    assert "low valence, low arousal (5 frames)" in notes_of(report, "unseen-regions")[""].message
    assert "uncertain by ±" in notes_of(report, "few-videos")[""].message


def test_every_clip_has_a_share_and_statistics(tmp_path: Path) -> None:
    rows = [(0.1, -0.2), (-5, -5), (0.3, 0.4), (-5, -5)]
    report = labelled(tmp_path, {"a": ("train", rows), "b": ("val", rows[:1] * 3)})
    item = json.loads(json.dumps(document(report)))["items"]["a"]["labels"]
    known = np.array([row for row in rows if row[0] != -5])
    assert item["share_annotated"] == pytest.approx(len(known) / 20)
    for k, name in enumerate(("valence", "arousal")):
        assert item["statistics"][name]["mean"] == pytest.approx(known[:, k].mean(), abs=1e-6)
        assert item["statistics"][name]["std"] == pytest.approx(known[:, k].std(), abs=1e-6)
    assert item["unannotated_runs"] == [[1, 2], [3, 4]]


def test_every_finding_has_severity_count_items_remedy_and_cost(tmp_path: Path) -> None:
    three_videos(tmp_path)
    (tmp_path / "splits.csv").write_text("name,split\nfirst,train\nagain,val\nsecond,train\nthird,val\n")
    report = document(check(tmp_path))
    kinds = {kind["code"]: kind for kind in report["kinds"]}
    assert sum(kind["count"] for kind in kinds.values()) == len(report["findings"])
    leak = kinds["duplicate-across-splits"]
    assert (leak["severity"], leak["count"], leak["items"]) == ("error", 2, ["again", "first"])
    assert leak["remedies"] and leak["cost"] == COSTS["duplicate-across-splits"]


# --- audio alone, and a cache of the data set


def test_audio_only_clips_are_usable_and_noted(tmp_path: Path) -> None:
    write_media(tmp_path / "talk.wav", audio_track=AudioTrack(tones(1.6, 44100), codec="pcm_s16le"))
    report = check(tmp_path)
    media = report.checked[0].media
    assert media is not None and media.audio == "whole" and media.duration == pytest.approx(1.6, abs=0.1)
    assert notes_of(report, "audio-only")["talk"].severity == "note" and report.count("error") == 0


def test_labels_of_audio_that_count_frames_are_an_error(tmp_path: Path) -> None:
    """Extraction fails on such a clip."""
    write_media(tmp_path / "talk.mka", None, AudioTrack(tones(1.0, 16000), 16000))
    (tmp_path / "talk.csv").write_text("frame,valence,arousal\n0,0.1,0.2\n")
    report = check(tmp_path)
    assert "numbered by frame, and the clip is audio only" in notes_of(report, "bad-labels")["talk"].message
    assert report.total().usable == 0


def test_unreadable_audio_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "talk.mp3").write_bytes(b"no audio")
    assert notes_of(check(tmp_path), "unreadable")["talk"].severity == "error"


def test_items_removed_from_the_dataset_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, red in (("kept", 0), ("moved", 1), ("gone", 2)):
        write_media(root / f"{name}.mp4", VideoTrack(EVEN[: 20 + red]))
    cache = create_cache(tmp_path / "cache")
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    empty = {"time": np.arange(2.0), "value": np.zeros((2, 2), np.float32), "valid": np.zeros((2, 2), bool)}
    for clip in open_dataset(root).clips:
        assert clip.video is not None
        cache.write(LABELS, clip.id, empty, source={"video": file_identity(clip.video)}, meta={})
    (root / "moved.mp4").rename(root / "new name.mp4")
    (root / "gone.mp4").unlink()
    notes = notes_of(check_dataset(open_dataset(root), cache=cache), "absent-item")
    assert set(notes) == {"moved", "gone"} and "the same video is now new name" in notes["moved"].message
    assert f"vaflow cache drop {cache.place} --absent {root}" in notes["gone"].remedy


def test_a_clip_with_tables_of_persons_only_is_labelled(tmp_path: Path) -> None:
    for number, value in ((1, 0.1), (2, 5)):
        (tmp_path / f"clip#{number}.csv").write_text(f"frame,valence,arousal\n0,{value},0\n1,0,0.3\n")
    (tmp_path / "splits.csv").write_text("name,split\nclip,train\n")
    report = one(tmp_path)
    codes = {note.code for note in report.findings}
    assert not codes & {"no-labels", "no-labels-at-all", "split-unlabelled"}
    assert notes_of(report, "person-labels")[""].message.endswith("none of the clip: clip")
    assert report.checked[0].labels is not None and report.checked[0].labels.annotated == 2
    bad = notes_of(report, "bad-labels")["clip"]
    assert "clip#2.csv" in bad.message and bad.remedy == "Extraction skips the clip with --person all"
