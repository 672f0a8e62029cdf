"""Drawn people and voices differ and follow the hidden emotion path."""

from itertools import pairwise

import numpy as np
import pytest

from vaflow.demo.face import express, random_person
from vaflow.demo.scenario import DemoConfig, Scene, demo_clips
from vaflow.demo.voice import (
    SAMPLE_RATE,
    Key,
    random_intervals,
    random_mood,
    random_speaker,
    smooth_curve,
    speak,
    within,
)


class Fixed:
    """A constant emotion path."""

    def __init__(self, valence: float, arousal: float) -> None:
        self.point = np.array([valence, arousal])

    def __call__(self, time):
        return np.tile(self.point, (len(time), 1))


@pytest.fixture(scope="module")
def clips():
    return demo_clips(DemoConfig())


def test_emotion_paths_are_smooth_and_within_range():
    time = np.arange(0, 300, 0.1)
    for index in range(5):
        value = random_mood(Key(0, "train", index))(time)
        assert (np.abs(value) < 1).all()
        assert np.abs(np.diff(value, axis=0)).max() < 0.1  # a tenth of a second changes little
        assert value.std(axis=0).min() > 0.15


def test_emotion_traces_are_deterministic():
    trace = smooth_curve(np.random.default_rng(0), slowest=20, fastest=2)
    time = np.array([0.0, 1.5, 7.25])
    expected = [
        sum(
            a * np.sin(2 * np.pi * t / p + f)
            for a, p, f in zip(trace.amplitude, trace.period, trace.phase, strict=True)
        )
        for t in time
    ]
    np.testing.assert_allclose(trace(time), expected)
    np.testing.assert_allclose(trace(time[1:2]), expected[1:2])


def test_quirk_spans_are_disjoint_and_inside_the_clip():
    for seed in range(20):
        spans = random_intervals(np.random.default_rng(seed), duration=40, share=0.15, shortest=2, longest=4)
        assert spans and spans[0][0] >= 0 and spans[-1][1] <= 40
        assert all(after[0] > before[1] for before, after in pairwise(spans))
        time = np.arange(0, 40, 0.01)
        assert within(time, spans).mean() == pytest.approx(sum(e - b for b, e in spans) / 40, abs=0.002)


def test_people_differ_in_face_and_voice(clips):
    people = [random_person(clip.key) for clip in clips]
    voices = [random_speaker(clip.key) for clip in clips]
    for feature in (
        [(person.skin, person.wall, person.hair, person.shirt) for person in people],
        [person.face_height for person in people],
        [voice.pitch for voice in voices],
    ):
        assert len(set(feature)) == len(clips)
    training = {clip.trial for clip in clips if clip.split == "train"}
    assert training.isdisjoint(clip.trial for clip in clips if clip.split == "val")


def test_a_pair_shares_only_its_clock(clips):
    left, right = (clip for clip in clips if clip.quirk == "pair")
    np.testing.assert_array_equal(left.times, right.times)
    assert left.video == right.video and left.key != right.key


def mean_face(valence: float, arousal: float) -> dict[str, float]:
    time = np.arange(0, 60, 0.2)
    numbers: dict[str, list[float]] = {}
    for index in range(8):
        key = Key(0, "train", index)
        face = express(key, random_person(key), Fixed(valence, arousal), np.zeros(10), time)
        for name in ("smile", "eyes", "brows", "mouth"):
            numbers.setdefault(name, []).append(float(np.mean(getattr(face, name))))
    return {name: float(np.mean(values)) for name, values in numbers.items()}


def test_the_mouth_follows_valence_and_the_eyes_follow_arousal():
    low, high = mean_face(-0.6, 0), mean_face(0.6, 0)
    assert high["smile"] - low["smile"] > 0.6
    calm, awake = mean_face(0, -0.6), mean_face(0, 0.6)
    assert awake["eyes"] - calm["eyes"] > 0.2 and awake["brows"] - calm["brows"] > 0.2
    assert abs(awake["smile"] - calm["smile"]) < 0.1


def voice_of(index: int, valence: float, arousal: float) -> np.ndarray:
    return speak(Key(0, "val", index), Fixed(valence, arousal), 8.0, []).samples


def loudness(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples.astype(np.float64) ** 2)))


def brightness(samples: np.ndarray) -> float:
    """Level above 1 kHz relative to the level below, in dB."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    high = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) > 1000
    return float(10 * np.log10(power[high].sum() / power[~high].sum()))


def pitch(samples: np.ndarray) -> float:
    """Median fundamental of the louder pieces, in Hz, from the autocorrelation."""
    periods = []
    for piece in samples[: len(samples) // 1024 * 1024].reshape(-1, 1024):
        if np.abs(piece).mean() > 0.6 * np.abs(samples).mean():
            spectrum = np.fft.rfft(piece - piece.mean(), 4096)
            correlation = np.fft.irfft(np.abs(spectrum) ** 2)[40:230]
            periods.append(SAMPLE_RATE / (40 + int(np.argmax(correlation))))
    return float(np.median(periods))


def test_the_voice_is_louder_higher_and_brighter_with_arousal():
    for measure, least in ((loudness, 6.0), (pitch, 20.0), (brightness, 1.0)):
        change = [measure(voice_of(k, 0, 0.6)) - measure(voice_of(k, 0, -0.6)) for k in range(4)]
        assert np.mean(change) > least


def test_the_voice_gets_brighter_with_valence_at_equal_loudness():
    voices = [(voice_of(k, -0.6, 0), voice_of(k, 0.6, 0)) for k in range(4)]
    assert np.mean([brightness(high) - brightness(low) for low, high in voices]) > 0
    assert abs(np.mean([loudness(high) - loudness(low) for low, high in voices])) < 2


def test_silent_spans_contain_only_room_noise():
    key = Key(0, "train", 0)
    voice = speak(key, Fixed(0, 0.3), 10.0, [(4.0, 7.0)])
    quiet = voice.samples[int(4.3 * SAMPLE_RATE) : int(6.7 * SAMPLE_RATE)]
    assert loudness(quiet) == pytest.approx(random_speaker(key).room, abs=0.5)
    assert loudness(voice.samples[: 4 * SAMPLE_RATE]) > loudness(quiet) + 15
    assert (voice.mouth[430:670] == 0).all() and voice.mouth[:400].max() > 0.5


def test_audio_has_the_requested_length_without_clipping():
    for seconds in (1.0, 7.123):
        samples = speak(Key(0, "train", 1), Fixed(0, 0.9), seconds, []).samples
        assert len(samples) == round(seconds * SAMPLE_RATE) and np.abs(samples).max() < 1


def test_hidden_faces_have_no_crops(clips):
    clip = clips[0]
    scene = Scene(clip, np.zeros(10), 256, 192)
    hidden = within(clip.times, clip.occlusions)
    assert 0.05 < hidden.mean() < 0.3 and not clip.cropped[hidden].any()
    assert clip.cropped[~hidden].mean() > 0.97
    begin, end = clip.occlusions[0]
    middle = int(np.searchsorted(clip.times, (begin + end) / 2))
    x, y, _ = (round(v) for v in scene.artist.place(middle))
    with_cover, face = scene.frame(middle), scene.artist.draw(middle)
    assert np.abs(with_cover[y, x].astype(int) - scene.cover).max() <= 60  # the book or its title
    assert np.abs(with_cover.astype(int) - face).mean() > 5
    frame = int(np.flatnonzero(clip.cropped & (scene.covered == 0))[0])
    np.testing.assert_array_equal(scene.frame(frame), scene.artist.draw(frame))
