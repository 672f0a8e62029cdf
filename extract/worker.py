"""A decoding process: reads one clip at a time and sends what it finds. Imports no torch, so it starts fast.

The pipe to the pipeline is the back-pressure: it holds little, so a worker that is ahead waits in `send`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vaflow.datasets.clip import Clip
from vaflow.datasets.formats import read_annotation
from vaflow.datasets.labels import on_clock
from vaflow.errors import MediaError, VaflowError, explain
from vaflow.extract.audio import AudioSummary, Blocks, decode_audio
from vaflow.extract.config import limit_memory, too_much_memory
from vaflow.extract.faces import CenterFace, PersonTracker, align, decode_jpeg, encode_jpeg
from vaflow.extract.faces.detection import Cells, find_faces
from vaflow.extract.faces.detection import Face as Detection
from vaflow.extract.image_folders import list_crops, open_stills, read_crop, stills_at
from vaflow.extract.messages import (
    Alive,
    Clock,
    Detect,
    Detected,
    Done,
    Face,
    FacesEnd,
    Failed,
    Job,
    Message,
    Sound,
    SoundEnd,
)
from vaflow.extract.nvdec import frames_on_gpu
from vaflow.extract.sources import sources_of
from vaflow.extract.video import MediaInfo, frame_times, frames_at, probe
from vaflow.process import listening
from vaflow.timeline import Floats, Ints, median_interval, nearest

Picture = np.ndarray[Any, Any]
Send = Callable[[Message], None]
Ask = Callable[[int, Sequence[Picture]], Sequence[Cells]]  # number of the job, prepared pictures -> of each
Frames = Iterator[tuple[int, Picture]]  # number in the clip
Images = Iterator[tuple[int, bytes, Picture]]  # grid sample, stored JPEG, the picture that it decodes to


def serve(pipe: Connection, work: "Callable[[Any, Callable[[Any], None]], None] | None" = None) -> None:
    """Read jobs until None comes, or the pipeline is gone; the target of a worker process.

    Args:
        pipe: to the pool.
        work: what is done with a job, sending messages; `run_job` where there is nothing else.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # both go to the whole group: the pipeline's to handle
        signal.signal(number, signal.SIG_IGN)
    limit_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the pipeline was killed
        while (job := pipe.recv()) is not None:
            pipe.send(Alive(job.number))
            with listening(partial(pipe.send, Alive(job.number))):
                work(job, pipe.send) if work else run_job(job, pipe.send, partial(_ask, pipe))


def _ask(pipe: Connection, job: int, pictures: Sequence[Picture]) -> Sequence[Cells]:
    """The pipeline's answer. Nothing else can come meanwhile: it gives jobs to idle workers only."""
    for number, picture in enumerate(pictures, start=1):
        pipe.send(Detect(job, picture, number == len(pictures)))
    answer: Detected = pipe.recv()
    return answer.cells


def _end_with_parent() -> None:
    """A killed pipeline leaves nobody decoding for no one: a long video without faces sends nothing for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nobody_to_ask(job: int, pictures: Sequence[Picture]) -> Sequence[Cells]:
    raise RuntimeError("The pipeline is to find faces, but cannot be asked")


def run_job(job: Job, send: Send, ask: Ask = _nobody_to_ask) -> None:
    """Send everything wanted of one clip, ending with `Done` or `Failed`. Errors of the clip never escape.

    Args:
        job: which clip, and what of it.
        send: takes each message.
        ask: answers where faces are; wanted where the job says that the pipeline finds them.
    """
    stage = "open"
    try:
        info, times = _open(job.clip)
        stage = "labels"
        duration = float(times[-1] + median_interval(times))
        send(_clock(job, info, times, duration))
        if job.audio:
            stage = "audio"
            _send_sound(job, info, duration, send)
        if job.faces:
            stage = "faces"
            _send_faces(job, times, duration, send, ask)
    except MemoryError as error:
        send(Failed(job.number, stage, type(error).__name__, too_much_memory()))
    except (VaflowError, OSError) as error:
        send(Failed(job.number, stage, type(error).__name__, str(error) or repr(error)))
    else:
        send(Done(job.number))


def _open(clip: Clip) -> tuple[MediaInfo, Floats]:
    if clip.frames is not None:
        return open_stills(clip)
    if clip.video is None:
        raise MediaError(
            explain(
                f"No video was found for {clip.id!r}, so the times of its frames are unknown",
                expected=f"a video named {clip.group} in one of the video folders",
                remedy="Add the video (crops alone carry no clock and no sound), or leave the trial out",
            )
        )
    info = probe(clip.video)
    if info.video is None:
        raise MediaError(
            explain(
                f"{clip.video.name} has no video stream",
                expected="a video stream, which gives the frame clock",
                got="sound only" if info.audio else "neither picture nor sound",
            )
        )
    return info, frame_times(clip.video, info=info)


def _clock(job: Job, info: MediaInfo, times: Floats, duration: float) -> Clock:
    clip, video = job.clip, info.video
    annotation = read_annotation(clip)
    labels = on_clock(annotation, times)
    facts: dict[str, Any] = {
        "split": clip.split,
        "group": clip.group,
        "duration": duration,
        "frames": int(times.size),
        "rows": 0 if annotation is None else int(annotation.value.shape[0]),
        "targets": [] if annotation is None else list(annotation.targets),
    }
    if video is not None:
        facts |= {
            "codec": video.codec,
            "width": video.width,
            "height": video.height,
            "nominal_rate": video.nominal_rate,
            "average_rate": video.average_rate,
        }
    return Clock(job.number, labels, duration, sources_of(clip), facts)


def _send_sound(job: Job, info: MediaInfo, duration: float, send: Send) -> None:
    blocks = _sound(job.clip, info, duration)
    while True:
        try:
            send(Sound(job.number, next(blocks)))
        except StopIteration as end:
            summary: AudioSummary = end.value
            break
    facts = {"audio": summary.status, "audio_peak": summary.peak, "audio_rate": summary.rate}
    send(SoundEnd(job.number, summary.covered, facts | {"audio_channels": summary.channels}))


def _sound(clip: Clip, info: MediaInfo, duration: float) -> Blocks:
    """Blocks of sound. Where it has a file of its own, that file begins when the picture does."""
    if clip.audio is None and clip.frames is not None:
        return AudioSummary("absent")
    if clip.audio is None or clip.audio == clip.video:
        return (yield from decode_audio(info.path, start=info.start, duration=duration))
    return (yield from decode_audio(clip.audio, start=probe(clip.audio).start, duration=duration))


def _send_faces(job: Job, times: Floats, duration: float, send: Send, ask: Ask) -> None:
    frame = nearest(times, job.grid.sample_times(duration))
    crops = list_crops(job.clip.crops) if job.clip.crops and job.face_source != "centerface" else None
    counts = {"samples": int(frame.size), "faces": 0, "unreadable_crops": 0}
    images = _read_crops(crops, frame, counts) if crops is not None else _cut_faces(job, frame, times, counts, ask)
    for sample, jpeg, image in images:
        counts["faces"] += 1
        prepared = {preparation: preparation(image) for preparation in job.preparations}
        send(Face(job.number, sample, prepared, jpeg if job.keep_jpeg else None))
    send(FacesEnd(job.number, frame, counts))


def _read_crops(crops: dict[int, Any], frame: Ints, counts: dict[str, int]) -> Images:
    """Crops by frame number, never by position. A missing or unreadable one leaves its sample invalid."""
    for sample, number in enumerate(frame.tolist()):
        if number not in crops:
            continue
        try:
            jpeg, image = read_crop(crops[number])
        except MediaError:
            counts["unreadable_crops"] += 1
            continue
        yield sample, jpeg, image


@cache
def _detector() -> CenterFace:
    """One per process: reading the model costs as much as a frame or two."""
    return CenterFace()


def _cut_faces(job: Job, frame: Ints, times: Floats, counts: dict[str, int], ask: Ask) -> Images:
    """Detect, follow one person, cut. The picture that is encoded is the one that would be stored."""
    samples_of: dict[int, list[int]] = {}
    for sample, number in enumerate(frame.tolist()):
        samples_of.setdefault(number, []).append(sample)
    frames = _whole_frames(job, np.unique(frame), times, counts)
    for number, image in frames if job.face_source == "none" else _aligned(job, frames, times, ask):
        jpeg = encode_jpeg(image)
        stored = decode_jpeg(jpeg)
        for sample in samples_of[number]:
            yield sample, jpeg, stored


def _aligned(job: Job, frames: Frames, times: Floats, ask: Ask) -> Frames:
    """One person's face in each of the frames in which it was found."""
    tracker = PersonTracker()
    for number, image, faces in _with_faces(job, frames, ask):
        face = tracker.update(faces, float(times[number]))
        if face is not None:
            yield number, align(image, face)


def _with_faces(job: Job, frames: Frames, ask: Ask) -> Iterator[tuple[int, Picture, list[Detection]]]:
    if job.ask:
        yield from find_faces(frames, partial(ask, job.number), job.ask)
        return
    detector = _detector()
    for number, image in frames:
        yield number, image, detector.detect(image)


def _whole_frames(job: Job, wanted: Ints, times: Floats, counts: dict[str, int]) -> Frames:
    """The wanted frames of a video or of a folder of pictures; of the latter, those that can be read."""
    clip = job.clip
    if clip.video is not None and job.decode_on:
        yield from frames_on_gpu(clip.video, wanted, times, job.decode_on)
    elif clip.video is not None:
        yield from frames_at(clip.video, wanted, times)
    elif clip.frames is not None:
        for number, image in stills_at(clip.frames, wanted):
            if image is None:
                counts["unreadable_frames"] = counts.get("unreadable_frames", 0) + 1
            else:
                yield number, image
