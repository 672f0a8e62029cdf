"""Estimate of an extraction: `vaflow extract --dry-run`. Writes nothing.

Durations come from container headers. Time and size are measured: some clips are opened to see which streams they
have, one clip is read, and every encoder runs on a few batches.
"""

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vaflow.cache import is_cache, open_cache
from vaflow.cache.schema import CROPS, LABELS, LOGMEL, PIXELS
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip, clip_and_person
from vaflow.device import choose_device
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.encoders.preprocessing import Preparation
from vaflow.errors import VaflowError
from vaflow.extract.config import MAX_SECONDS, ExtractConfig, Shard, default_workers
from vaflow.extract.decoding_pool import AudioEnd, Face, Failed, Job, Message, each
from vaflow.extract.doctor.facts import look_at_people
from vaflow.extract.durations import header_seconds, side_by_side
from vaflow.extract.faces.choice import ALL
from vaflow.extract.plan import shard_clips
from vaflow.extract.source_files import open_stills
from vaflow.extract.streams import compare, stores_everyone
from vaflow.extract.video import probe
from vaflow.extract.worker import run_job
from vaflow.process import beat

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
OPENED = 32  # clips opened to detect audio streams
LOOKED = 8  # clips in which people are counted
READ_SECONDS = 15.0  # limit for reading one clip
BATCHES = 2  # per encoder
DIMS = {"visual": 512, "audio": 768}  # of the default encoders, where none could be built
JPEG_BYTES = 12_000
Built = tuple["torch.device", list[VisualEncoder], list[AudioEncoder]]


def estimate(
    dataset: Dataset, out: Path, config: ExtractConfig, shard: Shard, *, show_progress: bool = False
) -> dict[str, Any]:
    """Return items, hours, frames, windows, bytes and minutes that an extraction would add.

    An item counts as extracted if the cache has it in every stream; changed source files are noticed by the extraction
    itself. "minutes" is None if it cannot be measured, and "time_not_measured" says why.

    Raises:
        FingerprintError: a stream in the cache was made with other settings.
    """
    mine = shard_clips(dataset.clips, shard)
    log.info("Measuring the speed of %s", ", ".join(config.encoders) or "reading")
    built = _built(config)
    held = _held(out, config, built)
    extracted = set.intersection(*held.values())
    clips = [clip for clip in mine if clip.id not in extracted]
    done = {name for name, items in held.items() if all(clip.id in items for clip in clips)}  # nothing to add to these
    visual, audio = ([name for name in names if name not in done] for names in (config.visual, config.audio))
    grid = config.grid
    seconds, samples, frames, windows, unreadable = 0.0, 0, 0, 0, 0
    probed = tqdm(_durations(clips), total=len(clips), unit="clip", desc="probe", disable=not show_progress)
    for clip, duration in probed:
        if duration is None:
            unreadable += 1
            continue
        seconds += duration
        samples += len(grid.sample_ticks(duration))
        frames += len(grid.sample_ticks(duration)) if clip.video or clip.frames else 0
        windows += len(grid.starts(duration))
    result: dict[str, Any] = {
        "items": len(clips),
        "items_already_there": len(mine) - len(clips),
        "items_unreadable": unreadable,
        "hours": round(seconds / 3600, 3),
        "frames_to_encode": frames * len(visual),
        "windows_to_encode": windows * len(audio),
    }
    some = clips[:: max(1, len(clips) // OPENED)]
    have_audio = [has_stream for _, has_stream in each(has_audio, some) if isinstance(has_stream, bool)]
    with_audio = sum(have_audio) / len(have_audio) if have_audio else 1.0
    dims, minutes, problem = _measured(config, built, done, some, seconds, frames, windows * with_audio)
    size = 2 if config.dtype == "float16" else 4
    sizes: dict[str, float] = {name: dims[name] * size * samples for name in config.visual}
    sizes |= {name: dims[name] * size * config.audio_steps * windows for name in config.audio}
    sizes |= {LOGMEL: with_audio * seconds * 100 * (128 * size + 9), LABELS: seconds * 30 * 18}
    sizes[PIXELS] = JPEG_BYTES * frames if config.pixels else 0
    if stores_everyone(config) and CROPS not in done:
        sizes[CROPS] = JPEG_BYTES * frames * _faces_of_everyone(some[:LOOKED])
    result["megabytes"] = round(sum(amount for name, amount in sizes.items() if name not in done) / 1e6, 1)
    return result | {"minutes": minutes} | ({"time_not_measured": problem} if problem else {})


def _built(config: ExtractConfig) -> Built | str:
    """Device, visual and audio encoders; or the reason why they cannot be built."""
    from vaflow.extract.encoding import build_encoders

    try:
        device = choose_device(config.device)
        return device, *build_encoders(config, device)
    except VaflowError as error:
        return str(error)


def _held(out: Path, config: ExtractConfig, built: Built | str) -> dict[str, set[str]]:
    """Stream -> clips that the cache has in it; raises FingerprintError if it was made with other settings."""
    if not is_cache(out):
        return {LABELS: set()}
    cache = open_cache(out, writable=True)  # to compare its streams; nothing is written
    if isinstance(built, str):
        names = [LABELS, *config.encoders, *([PIXELS] if config.pixels else [])]
    else:
        names = list(compare(cache, config, *built[1:]))
    held = {name: set(cache.source_stamps(name)) if name in cache.streams() else set() for name in names}
    if config.person == ALL:
        held = {name: items | {clip_and_person(item)[0] for item in items} for name, items in held.items()}
    return held


def _durations(clips: Sequence[Clip]) -> Iterator[tuple[Clip, float | None]]:
    """Every clip with its seconds, in any order; None if unreadable. FFmpeg opens files whose header lacks them."""
    media = [clip.video or (None if clip.frames else clip.audio) for clip in clips]
    unknown = []
    known = side_by_side(lambda path: header_seconds(path) if path else None, media)
    for clip, seconds in zip(clips, known, strict=True):
        if seconds is None or seconds > MAX_SECONDS:
            unknown.append(clip)
        else:
            yield clip, seconds
    for number, duration in each(probed_duration, unknown):
        yield unknown[number], None if isinstance(duration, Failed) else duration


def probed_duration(clip: Clip) -> float | None:
    """Duration of a clip in seconds according to FFmpeg, or None. Runs in a decoding process, and raises as `probe`."""
    path = clip.video or clip.audio
    if path is None and clip.frames is None:
        return None
    info = open_stills(clip)[0] if clip.frames is not None else probe(path or Path())
    stream = info.video or info.audio
    duration = stream.duration if stream is not None else None
    return duration if duration is not None and 0 <= duration <= MAX_SECONDS else None


def _faces_of_everyone(clips: Sequence[Clip]) -> float:
    """Mean number of crops of everyone per sampled frame: clips with one person store none."""
    durations = dict(each(probed_duration, clips))
    looked = [(clip, d) for number, clip in enumerate(clips) if isinstance(d := durations[number], float)]
    people = [facts.people for facts in look_at_people(looked).values()]
    return sum(count for count in people if count > 1) / max(len(clips), 1)


def has_audio(clip: Clip) -> bool:
    """Whether a clip has an audio stream. Runs in a decoding process, and raises as `probe`."""
    return clip.audio is not None and probe(clip.audio).audio is not None


def _measured(
    config: ExtractConfig,
    built: Built | str,
    done: Collection[str],
    clips: Sequence[Clip],
    seconds: float,
    frames: int,
    windows: float,
) -> tuple[dict[str, int], float | None, str]:
    """Dimension of each encoder, minutes of the extraction or None, and the reason if they were not measured.

    Args:
        built: the encoders, or why they cannot be built; done: names of those that have nothing to encode.
        seconds, frames, windows: to read and to encode.
    """
    from vaflow.extract.encoding import BATCH_SIZES, make_encoders

    dims = dict.fromkeys(config.visual, DIMS["visual"]) | dict.fromkeys(config.audio, DIMS["audio"])
    if not clips:
        return dims, 0.0, ""
    if isinstance(built, str):
        return dims, None, built
    device, visual, audio = built
    preparations = tuple(dict.fromkeys(encoder.preparation for encoder in visual))
    read = partial(read_some, config, preparations)
    readings = [result for _, result in each(read, clips[:3]) if isinstance(result, tuple)]
    if not readings:
        return dims, None, "none of the first clips can be read"
    cost, faces = np.mean(readings, axis=0).tolist()
    encoding, sizes = 0.0, BATCH_SIZES[device.type]
    encoders = make_encoders(config, device, visual, audio)
    for name, (encoder, batcher) in encoders.visual.items():
        dims[name], prepared = encoder.dim, encoder.preparation
        if name in done:
            continue
        image = np.zeros((prepared.size, prepared.size, 3), prepared.dtype)
        encoding += frames * faces * _seconds_per_row(batcher, image, config.image_batch or sizes["visual"])
    for name, (listener, batcher) in encoders.audio.items():
        dims[name], segments = listener.dim, listener.segments(config.window, config.audio_steps)
        if name in done:
            continue
        row = np.zeros((segments.frames, listener.front_end.bins), np.float32)
        seconds_per_row = _seconds_per_row(batcher, row, config.window_batch or sizes["audio"])
        encoding += windows * len(segments.first) * seconds_per_row
    workers = config.workers or default_workers(device.type)
    return dims, round(max(cost * seconds / workers, encoding) / 60, 3), ""


def _seconds_per_row(batcher: Any, row: np.ndarray[Any, Any], batch: int) -> float:
    rows, began = BATCHES * max(batch, 1), time.perf_counter()
    for _ in range(rows):
        batcher.add(row, lambda _: None)
    batcher.flush()
    return (time.perf_counter() - began) / rows


class _EnoughRead(Exception):
    pass


def read_some(config: ExtractConfig, preparations: tuple[Preparation, ...], clip: Clip) -> tuple[float, float] | None:
    """Read a clip for at most `READ_SECONDS`; runs in a decoding process.

    Returns:
        Seconds of work per second of the clip, and the share of samples with a face; None if it cannot be read.
    """
    grid, began = config.grid, time.perf_counter()
    duration, last, faces, audio = 0.0, -1, 0, 0.0

    def take(message: Message) -> None:
        nonlocal duration, last, faces, audio
        beat()
        elapsed = time.perf_counter() - began
        duration = getattr(message, "duration", duration)
        if isinstance(message, AudioEnd):
            audio = elapsed
        elif isinstance(message, Face):
            last, faces = message.sample, faces + 1
            if elapsed > READ_SECONDS:
                raise _EnoughRead

    job = Job(0, clip, grid, True, bool(preparations), config.face_source, preparations, keep_jpeg=False)
    samples = 0
    try:
        run_job(job, take)
        samples = len(grid.sample_ticks(duration))
    except _EnoughRead:
        samples = last + 1
    if not duration:
        return None
    elapsed = time.perf_counter() - began
    share = samples / max(len(grid.sample_ticks(duration)), 1)
    cost = audio + (elapsed - audio) / max(share, 1e-6)
    return cost / duration, faces / max(samples, 1)
