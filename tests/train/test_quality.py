"""Quality of faces and speech activity: masks of training inputs, and columns of predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache, open_cache
from vaflow.cache.schema import FACES, LABELS, LOGMEL, StreamInfo
from vaflow.errors import UsageError
from vaflow.train.config import TrainConfig, merge
from vaflow.train.data import load_split
from vaflow.train.inputs import during_speech, face_quality, resolve, speech_activity
from vaflow.train.prediction_files import frame_columns, prediction_csv
from vaflow.train.traces import Trace
from vaflow.train.windows import WindowSet

CLIP = "train0"
TOY = Toy(splits={"train": 1, "val": 1}, seconds=(12.0, 12.0), logmel=True, invalid=0.0)


@pytest.fixture
def old(tmp_path: Path) -> Cache:
    """A cache without faces and without speech activity."""
    return make_cache(tmp_path / "cache", TOY)


@pytest.fixture
def cache(old: Cache) -> Cache:
    """Person 2 is estimated: turned away from second 3 on. There is speech in the first 6 seconds."""
    old.declare(StreamInfo(FACES, "faces", 0, "float32", {"encoder": FACES}))
    for item in old.items():
        visual, mel = old.read(VISUAL, item), old.read(LOGMEL, item)
        frame = np.rint(visual.time * 10).astype(np.int64)
        old.write(VISUAL, item, dict(visual.arrays) | {"frame": frame}, meta={"person": 2})
        speech = mel.time < 6
        old.write(LOGMEL, item, dict(mel.arrays) | {"speech": speech}, meta={"speech": "energy"})
        rows = np.repeat(np.arange(len(frame)), 2)
        person = np.tile([1, 2], len(frame))
        yaw = np.where((person == 2) & (visual.time[rows] >= 3), 80, 0)
        count = len(rows)
        faces = {
            "time": visual.time[rows],
            "frame": frame[rows],
            "box": np.zeros((count, 4), np.float32),
            "landmarks": np.zeros((count, 5, 2), np.float32),
            "score": np.full(count, 0.8, np.float32),
            "size": np.full(count, 100, np.float32),
            "sharpness": np.full(count, 4, np.float32),
            "yaw": yaw.astype(np.float32),
            "mouth": np.zeros(count, np.float32),
            "track": person - 1,
            "person": person,
            "cut": np.zeros(0),
        }
        old.write(FACES, item, faces)
    return open_cache(old.path)


def load(cache: Cache, config: TrainConfig) -> WindowSet:
    config, inputs = resolve(cache, config)
    return load_split(cache, "train", inputs.streams, config)


def masks(cache: Cache, config: TrainConfig, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and validity of every sample of a stream that the windows read."""
    windows = load(cache, config)
    (clip,) = windows.clips
    return windows.sample_validity(clip, "visual" if stream == VISUAL else "audio")


def test_face_quality_belongs_to_the_chosen_person(cache: Cache) -> None:
    data = cache.read(VISUAL, CLIP)
    quality = face_quality(cache, VISUAL, CLIP, data)
    assert quality is not None
    np.testing.assert_allclose(quality[data.time < 3], 0.8 * 0.5, rtol=1e-5)
    assert (quality[data.time >= 3] < 0.1).all()


def test_poor_faces_are_masked(cache: Cache) -> None:
    time, valid = masks(cache, TrainConfig(min_face_quality=0.3), VISUAL)
    assert valid[time < 3].all() and not valid[time >= 3].any()
    _, everything = masks(cache, TrainConfig(), VISUAL)
    assert everything.all()


def test_audio_without_speech_is_masked(cache: Cache) -> None:
    _, everything = masks(cache, TrainConfig(), AUDIO)
    time, valid = masks(cache, TrainConfig(speech_mask=True), AUDIO)
    assert (valid[time < 5.4] == everything[time < 5.4]).all() and valid[time < 5.4].any()
    assert not valid[time > 6].any()


def test_log_mel_inputs_are_masked(cache: Cache) -> None:
    time, valid = masks(cache, TrainConfig(speech_mask=True, audio=(LOGMEL,)), AUDIO)
    assert valid[time < 5.5].any() and not valid[time > 6.1].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(min_face_quality=0.3), "min_face_quality requires face quality"),
        (TrainConfig(speech_mask=True), "speech_mask requires speech activity"),
    ],
)
def test_a_cache_without_quality_or_speech_is_rejected(old: Cache, config: TrainConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(old, config)
    assert len(load(old, replace(config, min_face_quality=0.0, speech_mask=False)))


def test_default_masks_are_not_recorded() -> None:
    assert not {"min_face_quality", "speech_mask"} & TrainConfig().as_dict().keys()
    assert merge({"min_face_quality": "0.4", "speech_mask": "true"}).as_dict()["min_face_quality"] == 0.4


def test_quality_and_speech_are_the_last_prediction_columns(cache: Cache, old: Cache) -> None:
    (clip,) = load(cache, TrainConfig()).clips
    columns = frame_columns(cache, [VISUAL], CLIP, clip.time)
    trace = Trace(clip, np.zeros((len(clip.time), 2)), None, **columns)
    header, *rows = prediction_csv(trace).splitlines()
    assert header.split(",")[-2:] == ["face_quality", "speech"]
    cells = [row.split(",") for row in rows]
    assert cells[0][-2:] == ["0.400", "1"]
    assert cells[-1][-1] == "0"


def test_a_cache_without_quality_or_speech_gives_no_columns(old: Cache) -> None:
    assert frame_columns(old, [VISUAL], CLIP, old.read(LABELS, CLIP).time) == {}
    assert speech_activity(old, CLIP) is None


def test_a_step_is_speech_if_half_of_it_is() -> None:
    speech = np.r_[np.ones(100, bool), np.zeros(100, bool)]
    assert during_speech(speech, np.array([[0.5, 0.99, 1.2, 5.0]]), 0.4).tolist() == [[True, True, False, False]]
