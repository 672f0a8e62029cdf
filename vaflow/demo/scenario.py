"""Plan of the synthetic data set (clips, people, irregularities of Aff-Wild2), and the images of each clip.

Clip k of a split does not depend on the number of clips, so a larger data set contains the smaller one.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from vaflow.demo.face import SHIRTS, Colour, FaceArtist, Image, Pen, draw_room, express, random_person, shade
from vaflow.demo.voice import Bools, Floats, Key, Mood, random_intervals, random_mood, smooth_curve, within
from vaflow.errors import UsageError, explain

VIDEO_KINDS = ("face", "noise")
AUDIO_KINDS = ("voice", "noise")
NTSC = 30_000 / 1001
CLOCK = Fraction(1, 30_000)  # divides 15, 25, 30 and 30000/1001 frames per second exactly

# Irregularity of the k-th trial of each split; later trials have none.
PAIR, VFR, FILM_RATE, MUTE, SHORT_AUDIO, SHORT_CLIP, STEREO = (
    "pair", "variable-rate", "29.97-fps", "no-audio", "short-audio", "short-clip", "stereo-44.1k"
)  # fmt: skip
ROLES: dict[str, tuple[str | None, ...]] = {
    "train": (None, PAIR, PAIR, VFR, FILM_RATE, MUTE, SHORT_AUDIO, SHORT_CLIP, STEREO),
    "val": (None, VFR, SHORT_AUDIO),
    "test": (None,),
}
EXTRA_ROWS = (1, 0, 1, 0, 1, 0, -3, 1, 2, 1, 0, 1)  # annotation rows minus video frames, by clip
UNLABELLED_EVERY = 4  # every fourth clip has a run of unannotated rows
SHORT_CLIP_SECONDS = 7.0
CROP_SIZE = 112
CROP_SCALE = 64.0  # half a face width in the crop, in pixels
CROP_CENTRE = 0.08  # centre of the crop, in half face widths below that of the head
EASE = 0.25  # seconds until an occlusion covers the face
NOISE_CELL = 8  # size of a noise square in pixels


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the data set.

    Args:
        train, val, test: trials in each split; a `_left`/`_right` pair counts as two.
        seconds: length of a clip.
        rate: nominal frames per second.
        width, height: of a video in pixels.
        seed: random seed of people, trajectories and labels.
        picture: "face" or "noise"; audio and labels do not depend on it.
        sound: "voice" or "noise"; video and labels do not depend on it.
        shuffle_labels: permute the annotated rows of the whole training split.

    Raises:
        UsageError: a value is out of range or not one of the choices.
    """

    train: int = 16
    val: int = 8
    test: int = 1
    seconds: float = 40.0
    rate: float = 15.0
    width: int = 256
    height: int = 192
    seed: int = 0
    picture: str = "face"
    sound: str = "voice"
    shuffle_labels: bool = False

    def __post_init__(self) -> None:
        least = {"train": 0, "val": 0, "test": 0, "seconds": 1, "rate": 1, "width": 64, "height": 64, "seed": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                value = getattr(self, name)
                raise UsageError(explain(f"{name} is too small", expected=f"at least {bound}", got=value))
        if self.width % 2 or self.height % 2:
            got = f"{self.width} x {self.height}"
            raise UsageError(explain("H.264 requires an even width and height", got=got))
        for name, choices in (("picture", VIDEO_KINDS), ("sound", AUDIO_KINDS)):
            if getattr(self, name) not in choices:
                raise UsageError(explain(f"Unknown {name}", got=getattr(self, name), choices=choices))


@dataclass(frozen=True)
class DemoClip:
    """One trial: one person in one video.

    Attributes:
        trial: its name.
        split: "train", "val" or "test".
        key: source of its random numbers.
        quirk: irregularity of its video, or None.
        folder: the folder below `raw_videos` that holds its video.
        times: [N] presentation times of the video's frames in seconds.
        rows: annotation rows; unlike N in some clips.
    """

    trial: str
    split: str
    key: Key
    quirk: str | None
    folder: str
    times: Floats
    rows: int

    @property
    def video(self) -> str:
        """The video's name without extension: the trial's without `_left` or `_right`."""
        return self.trial.removesuffix("_left").removesuffix("_right")

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return float(self.times[-1] + np.median(np.diff(self.times)))

    @cached_property
    def mood(self) -> Mood:
        """Valence and arousal over time."""
        return random_mood(self.key)

    @cached_property
    def occlusions(self) -> list[tuple[float, float]]:
        """Intervals in which the face is covered, in seconds."""
        return random_intervals(self.key.rng("occlusions"), self.seconds, share=0.14, shortest=1.5, longest=4.0)

    @cached_property
    def silences(self) -> list[tuple[float, float]]:
        """Intervals without speech, in seconds."""
        return random_intervals(self.key.rng("silences"), self.seconds, share=0.14, shortest=2.0, longest=4.5)

    @cached_property
    def cropped(self) -> Bools:
        """[N] whether the frame has a face crop: not if the face is covered, nor at random detector failures."""
        failed = self.key.rng("detector").random(len(self.times)) < 0.01
        return ~within(self.times, self.occlusions) & ~failed

    def row_times(self) -> Floats:
        """[rows] time of each annotation row: its frame's; after the last frame, at the median interval."""
        interval = float(np.median(np.diff(self.times)))
        beyond = self.times[-1] + interval * np.arange(1, max(self.rows - len(self.times), 0) + 1)
        return np.concatenate([self.times, beyond])[: self.rows]

    def annotated(self) -> Bools:
        """[rows] whether the row is annotated; some clips have an unannotated run at the start, middle or end."""
        known = np.ones(self.rows, bool)
        if self.split == "test" or self.key.index % UNLABELLED_EVERY:
            return known
        run = max(1, round(self.rows * self.key.rng("unlabelled").uniform(0.05, 0.12)))
        where = (self.key.index // UNLABELLED_EVERY) % 3
        begin = (self.rows // 3, 0, self.rows - run)[where]
        known[begin : begin + run] = False
        return known

    def labels(self) -> NDArray[np.float64]:
        """[rows, 2] valence and arousal; -5 in both if the row is not annotated."""
        return np.where(self.annotated()[:, None], np.round(self.mood(self.row_times()), 4), -5.0)


def demo_clips(config: DemoConfig) -> list[DemoClip]:
    """Every trial of the data set, in order; the two of a pair follow each other."""
    counts = (("train", config.train), ("val", config.val), ("test", config.test))
    return [_clip(config, split, index, count) for split, count in counts for index in range(count)]


def _clip(config: DemoConfig, split: str, index: int, count: int) -> DemoClip:
    """Trial `index` of a split with `count` trials."""
    roles = ROLES[split]
    quirk = roles[index] if index < len(roles) else None
    pair = [k for k, role in enumerate(roles) if role == PAIR]
    if quirk == PAIR and count <= pair[1]:
        quirk = None  # the split has no second trial for the pair
    key = Key(config.seed, split, index)
    name = f"{split}{index + 1:02d}"
    source = key
    if quirk == PAIR:  # both people of a pair share one video, hence one clock
        source = Key(config.seed, split, pair[0])
        name = f"{split}{pair[0] + 1:02d}" + ("_left" if index == pair[0] else "_right")
    # Presentation times as the file keeps them: rounded to its clock.
    times = np.rint(_frame_times(config, source, quirk) / float(CLOCK)) * float(CLOCK)
    rows = len(times) + (EXTRA_ROWS[index % len(EXTRA_ROWS)] if split != "test" else 0)
    return DemoClip(name, split, key, quirk, f"batch{1 + source.index % 2}", times, max(rows, 1))


def _frame_times(config: DemoConfig, key: Key, quirk: str | None) -> Floats:
    """[N] presentation times in seconds."""
    seconds = min(SHORT_CLIP_SECONDS, config.seconds) if quirk == SHORT_CLIP else config.seconds
    rate = NTSC if quirk == FILM_RATE else config.rate
    if quirk != VFR:
        return np.arange(max(2, round(seconds * rate))) / rate
    # Like a phone in changing light: the frame rate varies between two thirds and all of the nominal rate.
    clock = np.arange(max(2, round(seconds * rate))) / rate
    slowdown = 1.25 + 0.25 * np.clip(smooth_curve(key.rng("clock"), 20, 3, 0.7)(clock), -1, 1)
    gaps = slowdown / rate * key.rng("jitter").uniform(0.9, 1.1, len(clock))
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    return times[times < seconds]


class Scene:
    """The frames of one trial.

    Args:
        mouth: [C] how open the mouth is, at the voice's control rate.
        width, height: of a frame in pixels.
    """

    def __init__(self, clip: DemoClip, mouth: Floats, width: int, height: int) -> None:
        self.clip = clip
        person = random_person(clip.key)
        self.expression = express(clip.key, person, clip.mood, mouth, clip.times)
        self.artist = FaceArtist(person, self.expression, draw_room(person, clip.key, width, height))
        self.cover: Colour = SHIRTS[clip.key.rng("cover").integers(len(SHIRTS))]
        covered = np.zeros(len(clip.times))
        for begin, end in clip.occlusions:
            rise = np.minimum(clip.times - begin, end - clip.times) / EASE
            covered = np.maximum(covered, np.clip(rise, 0, 1))
        self.covered = covered * covered * (3 - 2 * covered)  # [N] covered part of the face, 0 to 1

    def frame(self, i: int) -> Image:
        """Frame i, [H, W, 3] BGR."""
        image = self.artist.draw(i)
        if self.covered[i] > 0:
            x, y, _ = self.artist.place(i)
            self._hide(Pen(image, (x, y), self.artist.scale, 0.12), float(self.covered[i]))
        return image

    def crop(self, i: int, frame: Image) -> Image:
        """The aligned face crop of frame i, [112, 112, 3] BGR, with the small error of a landmark detector."""
        x, y, turn = self.artist.place(i)
        slip_x, slip_y, slip_scale = self.expression.slip[i]
        unit = self.artist.scale
        ratio = CROP_SCALE / unit * (1 + slip_scale)
        matrix = cv2.getRotationMatrix2D((x, y), np.degrees(turn), ratio)
        matrix[:, 2] += CROP_SIZE / 2 - np.array([x, y]) + np.array([slip_x, slip_y - CROP_CENTRE]) * CROP_SCALE
        return cv2.warpAffine(
            frame, matrix, (CROP_SIZE, CROP_SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def _hide(self, pen: Pen, progress: float) -> None:
        """Draw a book that covers the face from below."""
        y = 3.6 + (0.1 - 3.6) * progress
        w, h = 1.25, 1.65
        book = np.array([[-w, y - h], [w, y - h], [w, y + h], [-w, y + h]])
        pen.fill(book, self.cover)
        pen.line(book, shade(self.cover, 0.7), 0.05, closed=True)
        pen.line(book[[0, 3]] + (0.2, 0), shade(self.cover, 0.8), 0.05)
        title = np.array([[-0.6, y - 0.9], [0.8, y - 0.9], [0.8, y - 0.5], [-0.6, y - 0.5]])
        pen.fill(title, shade(self.cover, 1.35))


class NoiseScene:
    """Noise frames without information, of the same size and times as those of `clip`."""

    def __init__(self, clip: DemoClip, width: int, height: int) -> None:
        self.rng = clip.key.rng("noise picture")
        self.width, self.height = width, height

    def frame(self, i: int) -> Image:
        """A frame of random coloured squares."""
        cells = self.rng.integers(0, 256, (-(-self.height // NOISE_CELL), -(-self.width // NOISE_CELL), 3), np.uint8)
        large = cv2.resize(cells, None, fx=NOISE_CELL, fy=NOISE_CELL, interpolation=cv2.INTER_NEAREST)
        return np.ascontiguousarray(large[: self.height, : self.width])

    def crop(self, i: int, frame: Image) -> Image:
        """The centre of the frame."""
        left, top = (self.width - CROP_SIZE) // 2, (self.height - CROP_SIZE) // 2
        return np.ascontiguousarray(frame[max(top, 0) :, max(left, 0) :][:CROP_SIZE, :CROP_SIZE])
