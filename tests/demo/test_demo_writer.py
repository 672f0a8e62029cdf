"""The synthetic dataset against the Aff-Wild2 format and FFmpeg's reading of its files."""

import json
import re
import time
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from vaflow.demo import write_demo
from vaflow.errors import UsageError

LABEL_FOLDERS = ("Train_Set", "Validation_Set")
TINY: dict[str, Any] = {"train": 1, "val": 1, "test": 0, "seconds": 2, "rate": 10, "width": 128, "height": 96}


def trials(written, folder):
    return sorted(path.stem for path in (written.root / "VA_Estimation_Challenge" / folder).iterdir())


def stem(trial):
    return re.sub("_(left|right)$", "", trial)


def frame_times(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.time for frame in container.decode(stream)]


def read_image(path: Path) -> Any:
    return cv2.imread(str(path))


def crop_numbers(written, trial):
    return sorted(int(path.stem) for path in (written.root / "cropped_aligned" / trial).iterdir())


def test_annotation_files_have_the_challenge_format(written):
    names = [trials(written, folder) for folder in LABEL_FOLDERS]
    assert [len(files) for files in names] == [9, 2]
    for folder, files in zip(LABEL_FOLDERS, names, strict=True):
        for trial in files:
            text = (written.root / "VA_Estimation_Challenge" / folder / f"{trial}.txt").read_text()
            assert text.splitlines()[0] == "valence,arousal" and text.endswith("\n")
            rows = np.array(written.labels(folder, trial))
            missing = rows == -5
            assert (missing[:, 0] == missing[:, 1]).all()
            assert (np.abs(rows[~missing]) <= 1).all()
            assert rows[~missing].std() > 0.01


def test_crops_are_numbered_from_one_by_video_frame(written):
    for folder in sorted((written.root / "cropped_aligned").iterdir()):
        files = [path.name for path in folder.iterdir()]
        assert all(re.fullmatch(r"\d{5}\.jpg", name) for name in files)
        frames = len(frame_times(written.videos()[stem(folder.name)]))
        numbers = crop_numbers(written, folder.name)
        assert numbers[0] >= 1 and numbers[-1] <= frames
        assert read_image(folder / files[0]).shape == (112, 112, 3)


def test_videos_have_h264_frames_and_aac_audio_of_equal_length(written):
    quiet = []
    for name, path in written.videos().items():
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            assert video.codec_context.name == "h264" and path.suffix == ".mp4"
            seconds = (container.duration or 0) / av.time_base
            if not container.streams.audio:
                quiet.append(name)
                continue
            audio = container.streams.audio[0]
            assert audio.codec_context.name == "aac"
            audio_seconds = sum(frame.samples for frame in container.decode(audio)) / audio.rate
            assert audio_seconds == pytest.approx(seconds, abs=0.15) or audio_seconds < 0.85 * seconds
    assert len(quiet) == 1


def test_videos_have_the_announced_frames_with_increasing_times(written):
    counted = 0
    for path in written.videos().values():
        times = frame_times(path)
        assert times[0] == 0 and (np.diff(times) > 0).all()
        counted += len(times) * (2 if path.stem == "train02" else 1)
    assert counted == sum(len(clip.times) for clip in written.clips)


def test_every_quirk_is_present(written):
    videos, times = written.videos(), {}
    for name, path in videos.items():
        times[name] = frame_times(path)
    gaps = {name: np.diff(seconds) for name, seconds in times.items()}
    assert sum(gap.max() > 1.2 * gap.min() for gap in gaps.values()) == written.quirks()["variable-rate"] == 2
    film = [name for name, gap in gaps.items() if np.allclose(gap, 1001 / 30000)]
    assert len(film) == written.quirks()["29.97-fps"] == 1
    assert sum(seconds[-1] < 10 for seconds in times.values()) == written.quirks()["short-clip"] == 1
    pair = [trial for trial in trials(written, "Train_Set") if trial != stem(trial)]
    assert pair == ["train02_left", "train02_right"] and "train02" in videos

    unlike, runs = 0, []
    for folder in LABEL_FOLDERS:
        for trial in trials(written, folder):
            rows = written.labels(folder, trial)
            unlike += len(rows) != len(times[stem(trial)])
            known = [(value, len(list(group))) for value, group in groupby(row == (-5, -5) for row in rows)]
            runs += [(known[0][0], length) for missing, length in known if missing]
    assert unlike == written.quirks()["rows-unlike-frames"] > 2
    assert len(runs) == written.quirks()["unannotated-run"] and min(length for _, length in runs) > 3
    assert {at_start for at_start, _ in runs} == {True, False}

    gapped = sum(
        len(crop_numbers(written, folder.name)) < len(times[stem(folder.name)])
        for folder in (written.root / "cropped_aligned").iterdir()
    )
    assert gapped == written.quirks()["missing-crops"] == 12


def test_a_pair_shares_one_video_with_two_faces(written):
    left, right = (written.labels("Train_Set", f"train02_{side}") for side in ("left", "right"))
    shared = min(len(left), len(right))
    assert left[:shared] != right[:shared]
    with av.open(str(written.videos()["train02"])) as container:
        frame = next(container.decode(video=0))
    assert (frame.width, frame.height) == (320, 120)


def test_test_trials_have_crops_and_a_sample_submission_but_no_labels(written):
    names = (written.root / "Valence_Arousal_Estimation_Challenge_test_set_release.txt").read_text().split()
    assert names == ["test01"] and crop_numbers(written, "test01")
    assert not any(path.stem == "test01" for path in (written.root / "VA_Estimation_Challenge").rglob("*.txt"))
    sample = (written.root / "VA_test_set_sample.txt").read_text().splitlines()
    assert sample[0] == "image_location,valence,arousal"
    frames = len(frame_times(written.videos()["test01"]))
    assert [line.split(",")[0] for line in sample[1:]] == [f"test01/{k:05d}.jpg" for k in range(1, frames + 1)]


@pytest.mark.parametrize("trial", ["train01", "train04"])  # constant and variable frame rate
def test_crops_show_the_frame_of_their_number(written, trial):
    """Crops match the decoded frame of their number better than frames some distance away."""
    with av.open(str(written.videos()[trial])) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    numbers = [n for n in crop_numbers(written, trial) if 12 < n < len(frames) - 12][::9]
    folder = written.root / "cropped_aligned" / trial
    crops = [cv2.imread(str(folder / f"{n:05d}.jpg"), cv2.IMREAD_GRAYSCALE) for n in numbers]
    shifts = (-12, -6, -3, 0, 3, 6, 12)
    alike = [
        np.mean([_likeness(frames[n - 1 + shift], crop) for n, crop in zip(numbers, crops, strict=True)])
        for shift in shifts
    ]
    assert shifts[int(np.argmax(alike))] == 0 and max(alike) > 0.7


def _likeness(frame, crop):
    """Best correlation of the middle of a crop with any place of a frame, at the crop's own scale or near it."""
    middle = crop[16:96, 16:96]
    scores = []
    for size in range(28, 44, 2):
        small = cv2.resize(middle, (size, size), interpolation=cv2.INTER_AREA)
        scores.append(cv2.matchTemplate(frame, small, cv2.TM_CCOEFF_NORMED).max())
    return max(scores)


def files(root, pattern):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(pattern))}


def decoded(root, kind):
    """Every decoded image or audio file of a dataset, by file name."""
    streams = {}
    for path in sorted(root.glob("raw_videos/*/*")):
        with av.open(str(path)) as container:
            streams[path.name] = [frame.to_ndarray() for frame in container.decode(**{kind: 0})]
    return streams


def same(one, other):
    return one.keys() == other.keys() and all(
        len(one[name]) == len(other[name])
        and all(np.array_equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


def test_files_depend_only_on_the_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo(tmp_path / name, seed=seed, **TINY)
    for pattern in ("VA_Estimation_Challenge/*/*", "cropped_aligned/*/*"):
        assert files(tmp_path / "a", pattern) == files(tmp_path / "b", pattern)
        assert files(tmp_path / "a", pattern) != files(tmp_path / "c", pattern)
    for kind in ("video", "audio"):
        assert same(decoded(tmp_path / "a", kind), decoded(tmp_path / "b", kind))


def test_noise_replaces_only_the_frames_or_only_the_audio(tmp_path):
    write_demo(tmp_path / "plain", **TINY)
    write_demo(tmp_path / "picture", picture="noise", **TINY)
    write_demo(tmp_path / "sound", sound="noise", **TINY)
    plain, video_noise, audio_noise = (tmp_path / name for name in ("plain", "picture", "sound"))
    labels = files(plain, "VA_Estimation_Challenge/*/*")
    assert (
        files(video_noise, "VA_Estimation_Challenge/*/*") == labels == files(audio_noise, "VA_Estimation_Challenge/*/*")
    )
    crops = files(plain, "cropped_aligned/*/*")
    replaced = files(video_noise, "cropped_aligned/*/*")
    assert crops == files(audio_noise, "cropped_aligned/*/*")
    assert crops.keys() == replaced.keys() and all(crops[name] != replaced[name] for name in crops)
    assert same(decoded(plain, "audio"), decoded(video_noise, "audio"))
    assert same(decoded(plain, "video"), decoded(audio_noise, "video"))
    assert not same(decoded(plain, "audio"), decoded(audio_noise, "audio"))
    assert not same(decoded(plain, "video"), decoded(video_noise, "video"))


def test_noise_frames_carry_no_information(tmp_path):
    write_demo(tmp_path, picture="noise", **TINY)
    images = [read_image(p).astype(float) for p in sorted((tmp_path / "cropped_aligned" / "train01").iterdir())]
    likeness = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairwise(images)]
    assert max(map(abs, likeness)) < 0.2


def test_shuffling_permutes_only_training_rows(tmp_path):
    options = TINY | {"train": 4}
    for name, shuffle in (("plain", False), ("shuffled", True)):
        write_demo(tmp_path / name, shuffle_labels=shuffle, **options)
    assert files(tmp_path / "plain", "cropped_aligned/*/*") == files(tmp_path / "shuffled", "cropped_aligned/*/*")
    validation = "VA_Estimation_Challenge/Validation_Set/*"
    assert files(tmp_path / "plain", validation) == files(tmp_path / "shuffled", validation)
    plain, shuffled = (
        [line.split(b"\n")[1:-1] for line in files(tmp_path / name, "VA_Estimation_Challenge/Train_Set/*").values()]
        for name in ("plain", "shuffled")
    )
    assert sorted(chain(*plain)) == sorted(chain(*shuffled))
    missing = [[row == b"-5,-5" for row in rows] for rows in plain]
    assert missing == [[row == b"-5,-5" for row in rows] for rows in shuffled]
    before, after = (
        np.array([[float(x) for x in row.split(b",")] for row in chain(*rows) if row != b"-5,-5"])
        for rows in (plain, shuffled)
    )
    assert abs(np.corrcoef(before[:, 0], after[:, 0])[0, 1]) < 0.4


def test_a_larger_dataset_contains_the_smaller_one(tmp_path):
    write_demo(tmp_path / "small", **TINY)
    write_demo(tmp_path / "large", **TINY | {"train": 2, "val": 2})
    large = files(tmp_path / "large", "cropped_aligned/*/*")
    assert files(tmp_path / "small", "cropped_aligned/*/*").items() < large.items()


def test_current_copies_are_not_written_again(tmp_path):
    assert write_demo(tmp_path, **TINY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not write_demo(tmp_path, **TINY)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_interrupted_dataset_is_rewritten(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, name):
        raise Stop

    with pytest.raises(Stop):
        write_demo(tmp_path / "cut", progress=stop, **TINY)
    assert json.loads((tmp_path / "cut" / "demo.json").read_text())["complete"] is False
    assert write_demo(tmp_path / "cut", **TINY)
    write_demo(tmp_path / "whole", **TINY)
    for pattern in ("VA_Estimation_Challenge/*/*", "cropped_aligned/*/*"):
        assert files(tmp_path / "cut", pattern) == files(tmp_path / "whole", pattern)


def test_progress_counts_videos(tmp_path):
    reports = []
    write_demo(tmp_path, progress=lambda *counts: reports.append(counts), **TINY | {"train": 3})
    assert [done for done, _, _ in reports] == [1, 2, 3] and {total for _, total, _ in reports} == {3}
    assert sorted(name for _, _, name in reports) == ["train01", "train02", "val01"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"picture": "photo"}, "picture"),
        ({"sound": "music"}, "sound"),
        ({"seconds": 0}, "seconds"),
        ({"rate": float("nan")}, "rate"),
        ({"width": 101}, "even"),
        ({"trian": 3}, "train"),
    ],
)
def test_invalid_options_are_rejected_by_name(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        write_demo(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_foreign_directories_are_not_changed(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(UsageError, match="not empty"):
        write_demo(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="folder"):
        write_demo(tmp_path / "thesis.txt", **TINY)


def test_a_dataset_with_other_settings_is_rejected_and_kept(tmp_path):
    write_demo(tmp_path, **TINY)
    with pytest.raises(UsageError, match="seed=0"):
        write_demo(tmp_path, **TINY | {"seed": 1})


def test_a_damaged_marker_file_is_reported(tmp_path):
    Path(tmp_path / "demo.json").write_text("[")
    with pytest.raises(UsageError, match=r"demo\.json"):
        write_demo(tmp_path, **TINY)


def test_an_interruption_starts_no_other_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def write_slowly(out: Path, config: object, people: Any) -> None:
        started.append(people[0].video)
        time.sleep(0.01)

    def interrupt(done: int, count: int, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vaflow.demo._write_video", write_slowly)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", **TINY | {"train": 400}, progress=interrupt)
    assert len(started) < 200
