"""The demo: synthetic clips in the layout of Aff-Wild2 -> cache -> trained heads -> scores on unseen people -> figures.

raw_videos/batch1/<video>.mp4                  H.264 + AAC
cropped_aligned/<trial>/00001.jpg              112 x 112, numbered by video frame from 1, some missing
VA_Estimation_Challenge/{Train_Set,Validation_Set}/<trial>.txt
Valence_Arousal_Estimation_Challenge_test_set_release.txt, VA_test_set_sample.txt
demo.json                                      the settings; written last
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from numpy.typing import NDArray
from tqdm import tqdm

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.demo.face import Image
from vaflow.demo.scenario import CLOCK, MUTE, SHORT_AUDIO, STEREO, DemoClip, DemoConfig, NoiseScene, Scene, demo_clips
from vaflow.demo.voice import SAMPLE_RATE, Floats, Voice, noise_audio, speak
from vaflow.errors import UsageError, VaflowError, command, explain
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.train.config import TrainConfig
from vaflow.train.train_run import train_run

VIDEOS, CROPS, LABELS = "raw_videos", "cropped_aligned", "VA_Estimation_Challenge"
LABEL_FOLDERS = {"train": "Train_Set", "val": "Validation_Set"}
TEST_LIST = "Valence_Arousal_Estimation_Challenge_test_set_release.txt"
TEST_SAMPLE = "VA_test_set_sample.txt"
MARKER = "demo.json"
JPEG_QUALITY = 92
CD_RATE = 44_100
QUALITY = "23"  # of H.264
BLOCK = 1024  # samples of one AAC frame
VISUAL, AUDIO = "clip-tiny", "ast-tiny"
CLIPS = 24  # labelled clips, training and validation
# Deviations from the published settings: the first removes the large constant offset in features of random encoders;
# the second adds standard deviations and leaves the predictions as they are.
TRAINING: dict[str, Any] = {"normalize": "standard", "uncertainty": "variance"}

Progress = Callable[[int, int, str], None]
log = logging.getLogger(__name__)


def write_video(
    path: Path, frames: Iterable[Image], times: Floats, samples: NDArray[np.float32] | None, sample_rate: int
) -> None:
    """Encode one MP4 file.

    Args:
        frames: N images [H, W, 3], BGR uint8, H and W even and the same for all.
        times: [N] presentation times in seconds, ascending.
        samples: [S] mono or [S, 2] stereo in [-1, 1], or None for a file without an audio stream.
        sample_rate: in Hz.
    """
    with av.open(str(path), "w") as container:
        video: VideoStream | None = None
        audio: AudioStream | None = None
        blocks: list[tuple[float, av.AudioFrame]] = []
        if samples is not None:
            layout = "mono" if samples.ndim == 1 else "stereo"
            audio = container.add_stream("aac", rate=sample_rate, layout=layout)
            audio.bit_rate = 48_000 * (1 if samples.ndim == 1 else 2)
            blocks = _audio_blocks(samples, sample_rate, layout)
        for frame, time in zip(frames, times, strict=True):
            if video is None:
                video = _video_stream(container, frame, times)
            while audio is not None and blocks and blocks[0][0] <= time:
                container.mux(audio.encode(blocks.pop(0)[1]))
            image = av.VideoFrame.from_ndarray(frame, format="bgr24")
            image.pts, image.time_base = round(time / float(CLOCK)), CLOCK
            container.mux(video.encode(image))
        for _, block in blocks:
            container.mux(audio.encode(block) if audio is not None else [])
        for stream in (video, audio):
            if stream is not None:
                container.mux(stream.encode(None))


def _video_stream(container: av.container.OutputContainer, frame: Image, times: Floats) -> VideoStream:
    rate = Fraction(len(times) - 1, 1) / Fraction(float(times[-1] - times[0])).limit_denominator(30_000)
    stream = container.add_stream("libx264", rate=rate.limit_denominator(30_000))
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.options = {"preset": "ultrafast", "crf": QUALITY, "g": "60"}
    stream.codec_context.time_base = CLOCK
    stream.codec_context.thread_count = 1
    stream.time_base = CLOCK
    return stream


def _audio_blocks(samples: NDArray[np.float32], rate: int, layout: str) -> list[tuple[float, av.AudioFrame]]:
    """The samples in AAC frames, each with its time in seconds; the last one may be shorter."""
    planes = np.atleast_2d(np.ascontiguousarray(samples.T, dtype=np.float32))
    blocks: list[tuple[float, av.AudioFrame]] = []
    for begin in range(0, planes.shape[1], BLOCK):
        part = np.ascontiguousarray(planes[:, begin : begin + BLOCK])
        block = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        block.sample_rate, block.pts, block.time_base = rate, begin, Fraction(1, rate)
        blocks.append((begin / rate, block))
    return blocks


def write_demo(out: Path, *, progress: Progress | None = None, **options: Any) -> bool:
    """Write the data set to `out`; return False if it exists there already.

    Args:
        out: a folder that does not exist, is empty, or holds demo data of the same settings.
        progress: called with (finished videos, all videos, name) after each video.
        options: the fields of `DemoConfig`: train, val, test, seconds, rate, width, height, seed, picture, sound,
            shuffle_labels. The same seed gives the same people and labels for every value of picture and sound.

    Raises:
        UsageError: an option is wrong, or `out` holds other files.
    """
    names = [field.name for field in fields(DemoConfig)]
    for name in options:
        if name not in names:
            raise UsageError(explain("Unknown option of the demo data", got=name, choices=names))
    config = DemoConfig(**options)
    out = Path(out)
    clips = demo_clips(config)
    if _is_written(out, config):
        return False
    try:
        for folder in (VIDEOS, CROPS, *(f"{LABELS}/{name}" for name in LABEL_FOLDERS.values())):
            (out / folder).mkdir(parents=True, exist_ok=True)
        _write_marker(out, config, complete=False)
    except OSError as error:
        remedy = "Choose a writable folder with --out"
        raise UsageError(explain(f"Cannot write into {out}", got=error, remedy=remedy)) from error
    videos = [list(group) for _, group in groupby(clips, key=lambda clip: clip.video)]
    # Drawing and encoding release the interpreter lock, so threads run in parallel.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(_write_video, out, config, group): group[0].video for group in videos}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                if progress is not None:
                    progress(done, len(videos), jobs[job])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C, start no other video
    _write_labels(out, config, clips)
    _write_marker(out, config, complete=True)
    return True


def _write_marker(out: Path, config: DemoConfig, complete: bool) -> None:
    text = json.dumps({"written_by": "vaflow demo", "complete": complete, "settings": asdict(config)}, indent=2)
    (out / MARKER).write_text(text + "\n", encoding="utf-8")


def _is_written(out: Path, config: DemoConfig) -> bool:
    """Return whether `out` holds exactly this data set, complete.

    Raises:
        UsageError: `out` holds other files.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(explain(f"{out} is a file", expected="a new or empty folder"))
    if not out.is_dir() or not any(out.iterdir()):
        return False
    remedy = "Choose another folder with --out, or delete this one"
    marker = out / MARKER
    if not marker.is_file():
        raise UsageError(explain(f"{out} is not empty and does not contain demo data", remedy=remedy))
    try:
        document = json.loads(marker.read_text(encoding="utf-8"))
        settings, complete = document["settings"], document["complete"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(explain(f"{marker} cannot be read", got=repr(error), remedy=remedy)) from error
    if settings != asdict(config):
        now = asdict(config).items()
        differ = ", ".join(f"{k}={settings.get(k)!r} (now {v!r})" for k, v in now if settings.get(k) != v)
        problem = f"{out} contains demo data with other settings"
        raise UsageError(explain(problem, got=differ or settings, remedy=remedy))
    return bool(complete)


def _write_video(out: Path, config: DemoConfig, people: Sequence[DemoClip]) -> None:
    """Write one video with its audio, and the face crops of its people."""
    first = people[0]
    voices = [speak(clip.key, clip.mood, clip.seconds, clip.silences) for clip in people]
    path = out / VIDEOS / first.folder / f"{first.video}.mp4"
    path.parent.mkdir(exist_ok=True)
    write_video(path, _frames(out, config, people, voices), first.times, *_audio(config, first, voices))


def _frames(out: Path, config: DemoConfig, people: Sequence[DemoClip], voices: Sequence[Voice]) -> Iterator[Image]:
    """Yield the frames, [H, W * people, 3] BGR, and write the crops of each frame."""
    size = config.width, config.height
    scenes: list[Scene | NoiseScene] = [
        NoiseScene(clip, *size) if config.picture == "noise" else Scene(clip, voice.mouth, *size)
        for clip, voice in zip(people, voices, strict=True)
    ]
    folders = [out / CROPS / clip.trial for clip in people]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for i in range(len(people[0].times)):
        frames = [scene.frame(i) for scene in scenes]
        for clip, scene, folder, frame in zip(people, scenes, folders, frames, strict=True):
            if clip.cropped[i]:
                _, data = cv2.imencode(".jpg", scene.crop(i, frame), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
                (folder / f"{i + 1:05d}.jpg").write_bytes(data.tobytes())
        yield frames[0] if len(frames) == 1 else np.concatenate(frames, axis=1)


def _audio(config: DemoConfig, clip: DemoClip, voices: Sequence[Voice]) -> tuple[NDArray[np.float32] | None, int]:
    """The audio samples and their sample rate; None for a video without an audio stream."""
    if clip.quirk == MUTE:
        return None, SAMPLE_RATE
    if config.sound == "noise":
        mono = noise_audio(clip.key, clip.seconds)
    else:
        mono = np.sum([voice.samples for voice in voices], axis=0, dtype=np.float32)
    if clip.quirk == SHORT_AUDIO:
        mono = mono[: round(0.8 * len(mono))]
    mono = np.clip(mono, -1, 1)
    if clip.quirk != STEREO:
        return mono, SAMPLE_RATE
    time = np.arange(int(len(mono) / SAMPLE_RATE * CD_RATE)) / CD_RATE
    left = np.interp(time, np.arange(len(mono)) / SAMPLE_RATE, mono)
    return np.stack([left, 0.8 * left], axis=-1).astype(np.float32), CD_RATE


def _write_labels(out: Path, config: DemoConfig, clips: Sequence[DemoClip]) -> None:
    """Write the annotations, the list of test trials and a sample submission."""
    values = {clip.trial: clip.labels() for clip in clips}
    if config.shuffle_labels:  # over all training trials; rows of -5 stay where they are
        train = [values[clip.trial] for clip in clips if clip.split == "train"]
        known = [value[:, 0] != -5 for value in train]
        shuffled = np.concatenate([value[mask] for value, mask in zip(train, known, strict=True)])
        shuffled = np.random.default_rng([config.seed, 99]).permutation(shuffled)
        ends = np.cumsum([mask.sum() for mask in known])
        for value, mask, part in zip(train, known, np.split(shuffled, ends[:-1]), strict=True):
            value[mask] = part
    for clip in clips:
        if clip.split in LABEL_FOLDERS:
            rows = [f"{v:g},{a:g}" for v, a in values[clip.trial]]
            text = "\n".join(["valence,arousal", *rows]) + "\n"
            (out / LABELS / LABEL_FOLDERS[clip.split] / f"{clip.trial}.txt").write_text(text, encoding="ascii")
    test = [clip for clip in clips if clip.split == "test"]
    if test:
        (out / TEST_LIST).write_text("".join(f"{clip.trial}\n" for clip in test), encoding="ascii")
        rows = [f"{clip.trial}/{k + 1:05d}.jpg,0,0" for clip in test for k in range(clip.rows)]
        text = "\n".join(["image_location,valence,arousal", *rows]) + "\n"
        (out / TEST_SAMPLE).write_text(text, encoding="ascii")


@dataclass(frozen=True)
class DemoResult:
    """Result of a demo.

    Attributes:
        out: folder of data, cache and run.
        metrics: scores of the full model on the held-out people, as in `metrics.json`.
        seconds: duration of each stage.
        pictures: the figures.
    """

    out: Path
    metrics: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


def run_demo(out: Path, *, seed: int = 0, clips: int = CLIPS, show_progress: bool = False) -> DemoResult:
    """Write clips, extract, train, evaluate and draw; finished steps are reused.

    Args:
        seed: random seed (synthetic data and training).
        clips: labelled clips; two thirds are for training.

    Raises:
        UsageError: `out` is not writable or holds other files; too few clips.
        VaflowError: a synthetic clip could not be extracted.
    """
    seconds: dict[str, float] = {}
    with (
        _timed("write clips", seconds),
        tqdm(total=clips, desc="write clips", unit="clip", disable=not show_progress, leave=False) as bar,
    ):

        def advance(done: int, videos: int, _: str) -> None:
            bar.total, bar.n = videos, done
            bar.refresh()

        write_demo(out / "data", progress=advance, seed=seed, train=clips - clips // 3, val=clips // 3)
    with _timed("extract", seconds):
        config = ExtractConfig(visual=(VISUAL,), audio=(AUDIO,), device="cpu")
        summary = extract(open_dataset(out / "data", "affwild2"), out / "cache", config, show_progress=show_progress)
    if summary.failures:
        raise VaflowError(explain("The synthetic clips could not be extracted", got=summary.failures[0].message))
    with _timed("train and evaluate", seconds):
        settings = TrainConfig(visual=(VISUAL,), audio=(AUDIO,), seed=seed, device="cpu", **TRAINING)
        result = train_run(open_cache(out / "cache"), settings, out / "run", show=show_progress)
    pictures = sorted((out / "run" / "pictures").glob("*.png"))
    return DemoResult(out, result.metrics, seconds, pictures)


def describe(result: DemoResult) -> str:
    """The result as text: scores with intervals, durations and the paths of the figures."""
    ccc, interval = result.metrics["ccc"], result.metrics["ci95"]
    lines = ["", "Held-out people, concatenated CCC (95 % interval from a bootstrap over videos):"]
    for name in ("valence", "arousal", "mean"):
        low, high = interval[name]  # None for a single video
        span = "no interval" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:8} {ccc[name]:.3f}  {span}")
    coverage = result.metrics["coverage"]
    known = {name: levels for name, levels in coverage.items() if any(x is not None for x in levels.values())}
    if known:
        lines += ["", f"Labels inside the intervals, in percent ({result.metrics['uncertainty']['held_out']}):"]
    for name, levels in known.items():
        shares = (f"{'-' if x is None else f'{100 * x:.1f}'} of stated {level}" for level, x in levels.items())
        lines.append(f"  {name:8} {', '.join(shares)}")
    lines += ["", "Time: " + ", ".join(f"{stage} {value:.0f} s" for stage, value in result.seconds.items())]
    lines += ["Figures:", *(f"  {path}" for path in result.pictures)]
    following = command("predict", result.out / "run", "YOUR_VIDEO.mp4", "--out", result.out / "predictions")
    lines += ["", f"Next: {following}"]
    return "\n".join(lines)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    log.info("%s ...", stage)
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
