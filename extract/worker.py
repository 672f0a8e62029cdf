"""A decoding process: reads one clip at a time and sends what it finds. Imports no torch, so it starts fast.

The pipe to the pipeline is the back-pressure: it holds little, so a worker that is ahead waits in `send`.
"""

import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vaflow.datasets.clip import Clip
from vaflow.datasets.labels import on_clock, read_annotation
from vaflow.errors import MediaError, VaflowError, explain
from vaflow.extract.audio import decode_audio
from vaflow.extract.crops import crops_identity, list_crops, read_crop
from vaflow.extract.faces import CenterFace, PersonTracker, align, decode_jpeg, encode_jpeg
from vaflow.extract.identity import file_identity
from vaflow.extract.media import MediaInfo, frame_times, frames_at, probe
from vaflow.extract.messages import Clock, Done, Face, FacesEnd, Failed, Job, Message, Sound, SoundEnd
from vaflow.timeline import Floats, Ints, median_interval, nearest

Send = Callable[[Message], None]
Images = Iterator[tuple[int, bytes, np.ndarray[Any, Any]]]  # grid sample, stored JPEG, the picture that it decodes to


def serve(pipe: Connection) -> None:
    """Read jobs until None comes; the target of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pipeline's to handle
    while (job := pipe.recv()) is not None:
        run_job(job, pipe.send)


def run_job(job: Job, send: Send) -> None:
    """Send everything wanted of one clip, ending with `Done` or `Failed`. Errors of the clip never escape."""
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
            _send_faces(job, times, duration, send)
    except (VaflowError, OSError, MemoryError) as error:
        send(Failed(job.number, stage, type(error).__name__, str(error) or repr(error)))
    else:
        send(Done(job.number))


def _open(clip: Clip) -> tuple[MediaInfo, Floats]:
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
    return Clock(job.number, labels, duration, _sources(clip), facts)


def _sources(clip: Clip) -> dict[str, Any]:
    sources: dict[str, Any] = {"split": clip.split, "group": clip.group}
    for part, path in (("video", clip.video), ("labels", clip.labels)):
        if path is not None:
            sources[part] = file_identity(path)
    if clip.audio is not None:
        sources["audio"] = sources["video"] if clip.audio == clip.video else file_identity(clip.audio)
    if clip.crops:
        sources["crops"] = crops_identity(list_crops(clip.crops))
    return sources


def _send_sound(job: Job, info: MediaInfo, duration: float, send: Send) -> None:
    blocks = decode_audio(job.clip.audio or info.path, start=info.start, duration=duration)
    while True:
        try:
            send(Sound(job.number, next(blocks)))
        except StopIteration as end:
            summary = end.value
            break
    facts = {"audio": summary.status, "audio_peak": summary.peak, "audio_rate": summary.rate}
    send(SoundEnd(job.number, summary.covered, facts | {"audio_channels": summary.channels}))


def _send_faces(job: Job, times: Floats, duration: float, send: Send) -> None:
    frame = nearest(times, job.grid.sample_times(duration))
    crops = list_crops(job.clip.crops) if job.clip.crops and job.face_source != "centerface" else None
    counts = {"samples": int(frame.size), "faces": 0, "unreadable_crops": 0}
    images = _read_crops(crops, frame, counts) if crops is not None else _cut_faces(job, frame, times)
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


def _cut_faces(job: Job, frame: Ints, times: Floats) -> Images:
    """Detect, follow one person, cut. The picture that is encoded is the one that would be stored."""
    samples_of: dict[int, list[int]] = {}
    for sample, number in enumerate(frame.tolist()):
        samples_of.setdefault(number, []).append(sample)
    video = job.clip.video
    if video is None:
        return
    detector = CenterFace() if job.face_source != "none" else None
    tracker = PersonTracker()
    for number, image in frames_at(video, np.unique(frame), times):
        if detector is not None:
            face = tracker.update(detector.detect(image), float(times[number]))
            if face is None:
                continue
            image = align(image, face)
        jpeg = encode_jpeg(image)
        stored = decode_jpeg(jpeg)
        for sample in samples_of[number]:
            yield sample, jpeg, stored
