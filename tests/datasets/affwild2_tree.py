"""Write a small tree with the quirks of Aff-Wild2: real media files with drawn faces.

Every picture, in videos and in crops, shows its own frame number as bars (`draw_number`, `decode_number`), so that
a test can tell which frame it was given.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 8
SIDE = 64
CROP_SIDE = 112
AUDIO_RATE = 16_000
TICK = Fraction(1, 1000)


@dataclass(frozen=True)
class Trial:
    """Facts of one trial.

    Attributes:
        split: "train", "val", "test" or None.
        group: the source video's stem.
        video: the file, or None where only labels were written.
        times: [N] seconds, the presentation times of the video's frames.
        labels: [R, 2] as written, -5 included; None for test trials.
        crops: 1-based numbers of the frames that have a crop.
        sound: seconds of sound; 0: no audio stream.
    """

    name: str
    split: str | None
    group: str
    video: Path | None
    times: NDArray[np.float64]
    labels: NDArray[np.float64] | None
    crops: tuple[int, ...]
    audio_seconds: float


@dataclass(frozen=True)
class Tree:
    """The root, its trials by name, and the sample submission (rows for all test trials)."""

    root: Path
    trials: dict[str, Trial]
    sample: Path


def draw_number(number: int, side: int = SIDE) -> NDArray[np.uint8]:
    """[side, side, 3]: the bits of `number` as grey bars, most significant on the left, light for one."""
    bits = [(number >> (BITS - 1 - i)) & 1 for i in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 150 + 50, side // BITS)
    return np.broadcast_to(row[None, :, None], (side, side, 3)).copy()


def decode_number(image: NDArray[np.uint8]) -> int:
    """The number that `draw_number` drew, from a picture of any size."""
    columns = image.reshape(image.shape[0], image.shape[1], -1).mean((0, 2))
    bits = [part[len(part) // 4 : -len(part) // 4].mean() > 125 for part in np.array_split(columns, BITS)]
    return sum(int(bit) << (BITS - 1 - i) for i, bit in enumerate(bits))


def write_video(path: Path, times: NDArray[np.float64], audio_seconds: float, *, index_first: bool = False) -> None:
    """A video whose frame k (1-based number k + 1) is shown at `times[k]`, with `audio_seconds` seconds of a tone.

    .mp4: H.264 and AAC, any times. .avi: MPEG-4 and PCM, constant rate only.
    `index_first`: the MP4's index stands in front of its data, so that a cut file still opens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_avi = path.suffix == ".avi"
    rate = Fraction(1) / Fraction(float(np.median(np.diff(times)))).limit_denominator(100_000)
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        container.metadata["title"] = path.stem  # unique metadata: equal video and audio would make the files equal
        video = container.add_stream("mpeg4" if is_avi else "libx264", rate=rate)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.bit_rate = 400_000
        time_base = 1 / rate if is_avi else TICK
        video.codec_context.time_base = time_base
        audio = (
            container.add_stream("pcm_s16le" if is_avi else "aac", rate=AUDIO_RATE, layout="mono")
            if audio_seconds
            else None
        )
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw_number(k + 1), format="rgb24")
            frame.pts, frame.time_base = round(Fraction(float(time)) / time_base), time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            wave = np.sin(np.arange(round(audio_seconds * AUDIO_RATE)) * 2 * np.pi * 220 / AUDIO_RATE)
            for start in range(0, wave.size, 1024):
                block = (wave[None, start : start + 1024] * 8000).astype(np.int16)
                tone = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                tone.sample_rate, tone.pts = AUDIO_RATE, start
                container.mux(audio.encode(tone))
            container.mux(audio.encode(None))


def write_labels(path: Path, labels: NDArray[np.float64]) -> None:
    """A challenge annotation file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["-5,-5" if v == -5 else f"{v:.3f},{a:.3f}" for v, a in labels]
    path.write_text("\n".join(["valence,arousal", *rows]) + "\n")


def write_crops(folder: Path, numbers: tuple[int, ...]) -> None:
    """One 112x112 JPEG per frame number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(draw_number(number, CROP_SIDE)).save(folder / f"{number:05d}.jpg", quality=90)


def label_path(rows: int, seed: int) -> NDArray[np.float64]:
    """[rows, 2] smooth values in [-1, 1], three decimals."""
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, 2)
    return np.round(0.9 * np.sin(np.linspace(0, 5, rows)[:, None] + phase), 3)


class _Builder:
    def __init__(self, root: Path, labels_under: str) -> None:
        self.root, self.labels_under = root, labels_under
        self.trials: dict[str, Trial] = {}

    def add(
        self,
        name: str,
        split: str | None,
        video: str,
        times: NDArray[np.float64],
        *,
        extra_rows: int = 0,
        unannotated: tuple[slice, ...] = (),
        crops: dict[str, tuple[int, ...]],
        audio_seconds: float,
    ) -> None:
        """Write one trial. `crops`: archive folder -> frame numbers; a video that exists already is shared."""
        path = self.root / video
        if not path.exists():
            write_video(path, times, audio_seconds)
        labels = None
        if split in ("train", "val"):
            labels = label_path(times.size + extra_rows, seed=len(self.trials))
            for part in unannotated:
                labels[part] = -5
            folder = {"train": "Train_Set", "val": "Validation_Set"}[str(split)]
            write_labels(self.root / self.labels_under / folder / f"{name}.txt", labels)
        for archive, numbers in crops.items():
            write_crops(self.root / archive / name, numbers)
        merged = tuple(sorted({number for numbers in crops.values() for number in numbers}))
        self.trials[name] = Trial(name, split, path.stem, path, times, labels, merged, audio_seconds)


def build_affwild2(
    root: Path, *, seconds: float = 2.0, rate: float = 25.0, labels_under: str = "Annotations/VA_Estimation_Challenge"
) -> Tree:
    """Write the tree below `root`; return its facts. All files are valid: see `spoil_affwild2`.

    Train: rows one more and three fewer than frames, two people in one video, -5 runs at start, middle and end, a
    video of its own whose name ends in _left, AVI, crops in two archives. Validation: variable frame rate with sound
    shorter than the picture, no sound with hardly any crop, a clip of half a second. Test: a list and a sample
    submission, no labels. One video belongs to the expression track only.
    """
    count = max(12, round(seconds * rate))
    assert count < 2**BITS, "frame numbers must fit the bars"
    even = np.arange(count) / rate
    uneven = np.round(np.cumsum([0.0] + [(1 + 1.5 * (k % 10 > 6)) / rate for k in range(count - 1)]), 3)
    brief = even[:12]
    old, new = "cropped_aligned", "cropped_aligned_new_50_vids"
    every = tuple(range(1, count + 1))
    gap = tuple(number for number in every if not 4 <= number <= 9)
    third, end = count // 3, even[-1] + 1 / rate
    tree = _Builder(root, labels_under)
    tree.add(
        "12-24-64x64", "train", "raw_videos/12-24-64x64.mp4", even, extra_rows=1, crops={old: gap}, audio_seconds=end
    )
    runs = (slice(0, 3), slice(third, third + 4), slice(-2, None))
    tree.add("video5_left", "train", "batch1/video5.mp4", even, unannotated=runs, crops={old: every}, audio_seconds=end)
    tree.add("video5_right", "train", "batch1/video5.mp4", even, crops={new: gap}, audio_seconds=end)
    tree.add("solo_left", "train", "batch2/solo_left.mp4", even, crops={old: every}, audio_seconds=end)
    halves = {old: every[:third], new: every[third:]}
    tree.add("video7", "train", "batch2/video7.avi", even, extra_rows=-3, crops=halves, audio_seconds=end)
    tree.add("8-30-64x64", "val", "raw_videos/8-30-64x64.mp4", uneven, crops={old: gap}, audio_seconds=uneven[-1] / 2)
    tree.add("video9", "val", "batch1/video9.mp4", even, crops={old: (count // 2,)}, audio_seconds=0.0)
    tree.add("brief", "val", "raw_videos/brief.mp4", brief, crops={old: every[:12]}, audio_seconds=brief[-1])
    tree.add("video20", "test", "batch2/video20.mp4", even, crops={new: gap}, audio_seconds=end)
    tree.add("video21_right", "test", "batch2/video21.mp4", even, extra_rows=1, crops={new: every}, audio_seconds=end)
    tree.add("smile", None, "batch1/smile.mp4", brief, crops={old: every[:12]}, audio_seconds=0.0)
    sample = _write_lists(root, tree.trials)
    (root / old / ".DS_Store").write_bytes(b"\0")
    return Tree(root, tree.trials, sample)


def _write_lists(root: Path, trials: dict[str, Trial]) -> Path:
    """The list of test trials, the sample submission, and the other track's files; returns the sample's path."""
    test = [trial for trial in trials.values() if trial.split == "test"]
    (root / "VA_test_set_release.txt").write_text("".join(f"{trial.name}\n" for trial in test))
    rows = [f"{trial.name}/{k + 1:05d}.jpg,0,0\n" for trial in test for k in range(trial.times.size)]
    sample = root / "VA_test_set_sample.txt"
    sample.write_text("image_location,valence,arousal\n" + "".join(rows))
    (root / "Expression_test_set_release.txt").write_text("smile\n")
    other = root / "Annotations" / "EXPR_Recognition_Challenge" / "Train_Set"
    other.mkdir(parents=True, exist_ok=True)
    (other / "smile.txt").write_text("Neutral,Anger\n" + "4\n" * 12)
    return sample


def spoil_affwild2(tree: Tree) -> dict[str, str]:
    """Add one trial per kind of damage; return trial -> problem."""
    root, good = tree.root, tree.trials["solo_left"]
    labels = next(root.rglob("Train_Set/solo_left.txt")).parent
    assert good.video is not None
    whole = good.video.read_bytes()
    wrong = {
        "novideo": "labels without a video",
        "text": "text named .mp4",
        "cut": "a video cut in the middle, its index at the end lost",
        "cutfront": "a video cut in the middle, its index in front whole",
        "badlabels": "labels with text in them",
        "toolong": "many more rows than frames",
        "faraway": "crops beyond the last frame",
    }
    for name in wrong:
        write_labels(labels / f"{name}.txt", label_path(good.times.size + 40 * (name == "toolong"), seed=9))
        if name != "novideo":
            (root / "raw_videos" / f"{name}.mp4").write_bytes(whole)
    (root / "raw_videos" / "text.mp4").write_text("this is no video\n" * 100)
    (root / "raw_videos" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (labels / "badlabels.txt").write_text("valence,arousal\n0.1,0.2\nlater,0.1\n0.1,7\n")
    front = root / "raw_videos" / "cutfront.mp4"
    write_video(front, good.times, good.audio_seconds, index_first=True)
    front.write_bytes(front.read_bytes()[: front.stat().st_size * 2 // 3])
    write_crops(root / "cropped_aligned" / "faraway", (1, 2, good.times.size + 30))
    write_labels(labels.parent / "Validation_Set" / "video5.txt", label_path(good.times.size, seed=8))
    wrong["video5"] = "its left and right are in the other split"
    return wrong
