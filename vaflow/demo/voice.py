"""Valence and arousal of a synthetic person over time, and the voice that follows them.

Everything that drifts with time is a sum of sinusoids with random periods and phases. It is defined at every instant:
video samples it at frame times, audio at its control rate, labels at annotation rows.

The voice is a glottal pulse train through moving formants, in syllables and phrases. Pitch, loudness, speaking rate and
brightness follow arousal; formants (a smile shortens the vocal tract) follow valence weakly. Each also drifts on its
own, so that audio alone tells arousal well but not perfectly, and valence a little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MoodAt = Callable[[Floats], Floats]  # [N] seconds -> [N, 2] valence and arousal

WAVES = 7  # sinusoids of a curve
SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}
SAMPLE_RATE = 16_000
CONTROL_RATE = 100  # pitch, loudness and formants are set this many times a second
HOP = SAMPLE_RATE // CONTROL_RATE
HARMONICS = 36
FADE = 0.12  # seconds from speech to silence, to avoid clicks

# F1, F2, F3 in Hz of the vowels that syllables draw from
VOWELS = np.array(
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410], [440, 1020, 2240]],
    np.float64,
)
BANDWIDTH = np.array([90.0, 110.0, 160.0])


@dataclass(frozen=True)
class Key:
    """Identifies a clip: the same key gives the same random numbers, independently of the other clips."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose of one clip; purposes are independent of each other."""
        return np.random.default_rng([self.seed, SPLIT_NUMBER[self.split], self.index, crc32(purpose.encode())])


@dataclass(frozen=True)
class Curve:
    """`scale * sum_k amplitude_k sin(2 pi t / period_k + phase_k)`, about unit variance before `scale`."""

    period: Floats
    phase: Floats
    amplitude: Floats
    scale: float = 1.0

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N] values."""
        angle = 2 * np.pi * np.asarray(time, np.float64)[:, None] / self.period + self.phase
        return self.scale * (np.sin(angle) @ self.amplitude)


def smooth_curve(rng: np.random.Generator, slowest: float, fastest: float, scale: float = 1.0) -> Curve:
    """A trace with periods between `fastest` and `slowest` seconds, slow waves being the larger ones."""
    # One period from each of `WAVES` equal slices of the logarithmic range: no clip is only slow or only fast.
    slices = (np.arange(WAVES) + rng.uniform(0, 1, WAVES)) / WAVES
    period = fastest * (slowest / fastest) ** slices
    amplitude = np.sqrt(period)
    amplitude *= np.sqrt(2 / np.sum(amplitude**2))
    return Curve(period, rng.uniform(0, 2 * np.pi, WAVES), amplitude, scale)


@dataclass(frozen=True)
class Mood:
    """Valence and arousal over time, shared by video, audio and labels of one person."""

    valence: Curve
    arousal: Curve

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N, 2] valence and arousal within (-1, 1)."""
        # tanh keeps the path inside the square and makes the extremes as rare as annotators make them.
        return np.stack([np.tanh(self.valence(time)), np.tanh(self.arousal(time))], axis=-1)


def random_mood(key: Key) -> Mood:
    """The trajectory of one person; valence and arousal are independent, and arousal is slower."""
    return Mood(
        smooth_curve(key.rng("valence"), slowest=45, fastest=8, scale=0.6),
        smooth_curve(key.rng("arousal"), slowest=60, fastest=14, scale=0.6),
    )


def random_intervals(
    rng: np.random.Generator, duration: float, share: float, shortest: float, longest: float
) -> list[tuple[float, float]]:
    """Disjoint intervals (begin, end) in seconds that cover about `share` of a clip, in order."""
    intervals: list[tuple[float, float]] = []
    total = 0.0
    for _ in range(100):
        if total >= share * duration:
            break
        length = min(rng.uniform(shortest, longest), duration / 2)
        begin = rng.uniform(0, duration - length)
        if all(begin > end + 1 or begin + length < start - 1 for start, end in intervals):
            intervals.append((begin, begin + length))
            total += length
    return sorted(intervals)


def within(time: Floats, intervals: list[tuple[float, float]]) -> Bools:
    """[N] seconds -> [N] whether an interval holds it."""
    inside = np.zeros(len(time), bool)
    for begin, end in intervals:
        inside |= (time >= begin) & (time < end)
    return inside


@dataclass(frozen=True)
class Speaker:
    """Constants of a voice: pitch in Hz, vocal tract, recording level and room noise in decibels."""

    pitch: float
    tract: float
    level: float
    room: float
    breath: float
    vibrato: float


@dataclass(frozen=True)
class Voice:
    """Audio and the mouth opening that belongs to it.

    Attributes:
        samples: [N] float32 in (-1, 1) at `SAMPLE_RATE`.
        mouth: [C] how open the mouth is, 0 to 1, at `CONTROL_RATE`; it follows the syllables, not the loudness.
    """

    samples: NDArray[np.float32]
    mouth: Floats


def random_speaker(key: Key) -> Speaker:
    """A voice; low and high ones equally often."""
    rng = key.rng("speaker")
    low = rng.random() < 0.5
    return Speaker(
        pitch=rng.uniform(95, 140) if low else rng.uniform(165, 225),
        tract=rng.uniform(0.92, 1.0) if low else rng.uniform(1.02, 1.14),
        level=rng.uniform(-5, 5),
        room=rng.uniform(-62, -54),
        breath=rng.uniform(0.01, 0.03),
        vibrato=rng.uniform(0.005, 0.015),
    )


def speak(key: Key, mood: MoodAt, seconds: float, silences: list[tuple[float, float]]) -> Voice:
    """The speech of the person `key` for a trajectory `mood`, with room noise only in `silences`."""
    speaker = random_speaker(key)
    time = np.arange(int(np.ceil(seconds * CONTROL_RATE)) + 1) / CONTROL_RATE
    valence, arousal = mood(time).T
    drift = {
        name: smooth_curve(key.rng(f"voice {name}"), slowest=25, fastest=2, scale=scale)(time)
        for name, scale in (("pitch", 0.12), ("level", 4.0), ("tract", 0.035), ("tilt", 1.0))
    }
    syllable, formants = _syllables(key.rng("syllables"), time, arousal)
    width = int(FADE * CONTROL_RATE)
    kernel = np.hanning(width + 2)[1:-1]
    talking = np.pad((~within(time, silences)).astype(np.float64), width, mode="edge")
    mouth = syllable * np.convolve(talking, kernel / kernel.sum(), mode="same")[width:-width]

    pitch = speaker.pitch * 2 ** (0.35 * arousal + drift["pitch"])
    pitch *= 1 + speaker.vibrato * np.sin(2 * np.pi * 5.2 * time)
    tract = speaker.tract * (1 + 0.06 * valence + drift["tract"])
    loudness = 10 ** ((speaker.level - 26 + 9 * arousal + drift["level"]) / 20) * mouth
    tilt = 13 - 4 * arousal + drift["tilt"]  # decibels lost per octave of frequency above 500 Hz

    noise = key.rng("room").standard_normal((2, len(time) * HOP)).astype(np.float32)
    audio = _harmonics(pitch, formants * tract[:, None], tilt, loudness)
    audio += noise[0] * _per_sample(loudness * speaker.breath) + noise[1] * np.float32(10 ** (speaker.room / 20))
    audio = audio[: round(seconds * SAMPLE_RATE)]
    return Voice(np.tanh(audio).astype(np.float32), mouth)


def _syllables(rng: np.random.Generator, time: Floats, arousal: Floats) -> tuple[Floats, Floats]:
    """Loudness of the syllables ([C], 0 to 1) and the vowel it forms ([C, 3] formants in Hz)."""
    rate = 3.4 + 1.3 * arousal  # syllables per second
    beat = np.cumsum(rate) / CONTROL_RATE
    number = np.floor(beat).astype(int)
    count = number[-1] + 2
    strength = rng.uniform(0.6, 1.0, count)
    # A phrase is five to eleven syllables, then one or two beats of breath.
    position = 0
    while position < count:
        position += int(rng.integers(5, 12))
        rest = int(rng.integers(1, 3))
        strength[position : position + rest] = 0
        position += rest
    envelope = np.sin(np.pi * (beat - number)) ** 0.7 * strength[number]
    vowel = VOWELS[rng.integers(0, len(VOWELS), count)]
    blend = np.clip((beat - number) * 3, 0, 1)[:, None]
    before = vowel[np.maximum(number - 1, 0)]
    return envelope, before + (vowel[number] - before) * blend


def _harmonics(pitch: Floats, formants: Floats, tilt: Floats, loudness: Floats) -> NDArray[np.float32]:
    """Sum of harmonics of `pitch` [C] Hz, weighted by `formants` [C, 3] Hz and `tilt` [C] dB/octave -> [C * HOP]."""
    phase = 2 * np.pi * np.cumsum(_per_sample(pitch, np.float64)) / SAMPLE_RATE
    # sin(k x) = 2 cos(x) sin((k - 1) x) - sin((k - 2) x): one multiplication per harmonic instead of a sine.
    twice_cos, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    total = np.zeros(len(phase), np.float32)
    for k in range(1, HARMONICS + 1):
        frequency = k * pitch
        # Three resonances over a falling glottal spectrum, without aliasing above half the sample rate.
        gain = (1 / (1 + ((frequency[:, None] - formants) / BANDWIDTH) ** 2)) @ np.array([1.0, 0.7, 0.45]) + 0.04
        octaves = np.log2(np.maximum(frequency, 50) / 500)
        gain *= 10 ** (-tilt * np.maximum(octaves, -1) / 20) * np.clip((0.47 * SAMPLE_RATE - frequency) / 500, 0, 1)
        total += _per_sample(loudness * gain) * now.astype(np.float32)
        before, now = now, twice_cos * now - before
    return total


def _per_sample(control: Floats, dtype: type = np.float32) -> NDArray[np.floating]:
    """[C] at `CONTROL_RATE` -> [C * HOP] at `SAMPLE_RATE`, linear between."""
    control = control.astype(dtype)
    step = np.diff(control, append=control[-1:])
    ramp = np.arange(HOP, dtype=dtype) / HOP
    return (control[:, None] + step[:, None] * ramp).reshape(-1)


def noise_audio(key: Key, seconds: float) -> NDArray[np.float32]:
    """[N] steady noise without information, as loud as a voice."""
    return (0.05 * key.rng("noise sound").standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)
