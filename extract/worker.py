"""Decoding process: reads one clip at a time and sends its frames, audio and labels. Imports no torch: starts fast.

The pipe to the pipeline provides back-pressure: it holds little, so a worker that is ahead waits in `send`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from vaflow.cache import open_cache
from vaflow.cache.schema import CROPS, FACES
from vaflow.datasets import read_annotation
from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.labels import clock_problem, on_clock, require_times
from vaflow.encoders.logmel import frame_count
from vaflow.errors import CorruptError, DataError, MediaError, VaflowError, count, explain
from vaflow.extract.audio import AudioSummary, Blocks, SpeechMeter, covered_frames, decode_audio, pass_on, stored_speech
from vaflow.extract.container import audio_clock, frame_times
from vaflow.extract.decoding_pool import (
    Ask,
    AudioBlock,
    AudioEnd,
    Clock,
    Done,
    Face,
    FaceCrop,
    FacesEnd,
    Failed,
    Image,
    Job,
    Message,
    Send,
)
from vaflow.extract.faces.choice import ALL, LARGEST, SPEAKING, WITHOUT_AUDIO, Speech, choose_person, speech_at
from vaflow.extract.faces.crops import align, decode_jpeg, encode_jpeg, quarter_turn
from vaflow.extract.faces.detection import Cells, find_faces, shared_detector
from vaflow.extract.faces.detection import Face as DetectedFace
from vaflow.extract.faces.identity import open_network
from vaflow.extract.faces.people import ClipFaces
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.source_files import (
    IMAGES_DIGEST,
    ImageDigest,
    check_unchanged,
    list_crops,
    open_stills,
    read_crop,
    sources_of,
    stills_at,
)
from vaflow.extract.video import MediaInfo, frames_at, frames_on_gpu, probe
from vaflow.process import beat
from vaflow.timeline import Floats, Ints, median_interval, nearest

open_once = cache(open_cache)  # one instance per process
Frames = Iterator[tuple[int, Image]]  # frame number, RGB image
Crops = Iterator[tuple[int, int, bytes]]  # number of the person, frame number, JPEG
Images = Iterator[tuple[int, int, bytes, Image]]  # person, grid sample, JPEG to store, the image that it decodes to

LISTED = 3  # label files whose problems a message states


def _nobody_to_ask(job: int, images: Sequence[Image]) -> Sequence[Cells]:
    raise RuntimeError("The job requires a detector in the parent, and run_job was called without `ask`")


def run_job(job: Job, send: Send, ask: Ask = _nobody_to_ask) -> None:
    """Read one clip and send its messages, ending with `Done` or `Failed`. Errors of the clip are never raised.

    Args:
        ask: returns the faces of images; required where `job.ask` is set.
    """
    reader = StoredReader(job, send) if job.stored is not None else ClipReader(job, send, ask)
    try:
        reader.run()
    except (VaflowError, OSError, MemoryError) as error:
        send(Failed.by(error, job.number, reader.stage))
    else:
        send(Done(job.number))


class ClipReader:
    """Reads one clip and sends it as messages.

    Attributes:
        stage: what is being read: "open", "labels", "audio" or "faces".
    """

    def __init__(self, job: Job, send: Send, ask: Ask) -> None:
        self._job, self._clip, self._send, self._ask = job, job.clip, send, ask
        self.stage = "open"

    def run(self) -> None:
        """Read the clip.

        Raises:
            VaflowError: the clip cannot be used, or a file changed while it was read.
            OSError: a file cannot be read.
        """
        # The identity is computed before reading, so that a record never names a version that was not read.
        sources = sources_of(self._clip) if self._is_complete() else {}
        self._info, self._times = self._open()
        self._duration = float(self._times[-1] + median_interval(self._times))
        self.stage = "labels"
        self._send_clock(sources)
        if self._job.audio:
            self.stage = "audio"
            self._send_audio()
        if self._job.faces:
            self.stage = "faces"
            self._send_faces()
        check_unchanged(self._clip, sources)

    def _is_complete(self) -> bool:
        """Whether the file that gives the clock exists; `_open` explains what is missing."""
        main = self._clip.video or self._clip.audio
        return self._clip.frames is not None or (main is not None and main.is_file())

    def _open(self) -> tuple[MediaInfo, Floats]:
        """The headers, and the frame times [N] in seconds."""
        clip = self._clip
        if clip.frames is not None:
            return open_stills(clip)
        if clip.video is None and clip.audio is not None:
            return probe(clip.audio), audio_clock(clip.audio)
        if clip.video is None:
            problem = f"Clip {clip.id!r} has no video, so the times of its frames are unknown"
            expected = f"a video named {clip.group} in one of the video folders"
            remedy = "Add the video (face crops have neither times nor audio), or remove the trial"
            raise MediaError(explain(problem, expected=expected, remedy=remedy))
        return probe(clip.video), frame_times(clip.video)

    def _send_clock(self, sources: dict[str, Any]) -> None:
        clip, video = self._clip, self._info.video
        everyone = self._job.person == ALL
        annotation, others = _annotations(clip, everyone=everyone)
        facts: dict[str, Any] = {
            "split": clip.split,
            "group": clip.group,
            "duration": self._duration,
            "frames": int(self._times.size) if video is not None else 0,
            **_annotation_facts(annotation),
        }
        if video is not None:
            names = ("codec", "width", "height", "nominal_rate", "average_rate")
            facts |= {name: getattr(video, name) for name in names}
            facts |= {"pixel_aspect": str(video.pixel_aspect)} if video.pixel_aspect != 1 else {}
            facts |= {"transfer": video.transfer} if video.transfer else {}
        times = self._times
        if video is None and annotation is not None:
            require_times(clip.id, annotation)
            times = times[:0]  # labels of an audio file keep their own times
        labels = on_clock(annotation, times)
        people = {k: (on_clock(one, times), _annotation_facts(one)) for k, one in others.items()}
        problem = next(filter(None, (clock_problem(one, self._times) for one in (annotation, *others.values()))), "")
        self._send(Clock(self._job.number, labels, self._duration, sources, facts, people, problem))

    # -- audio -----------------------------------------------------------------------------------------------------

    def _send_audio(self) -> None:
        summary = pass_on(self._audio_blocks(), lambda block: self._send(AudioBlock(self._job.number, block)))
        facts = {"audio": summary.status, "audio_peak": summary.peak, "audio_rate": summary.rate}
        self._send(AudioEnd(self._job.number, summary.covered, facts | {"audio_channels": summary.channels}))

    def _audio_blocks(self) -> Blocks:
        """Blocks of samples. An audio file of its own starts when the video does."""
        clip = self._clip
        if clip.audio is None and clip.frames is not None:
            return AudioSummary("absent")
        if clip.audio is None or clip.audio == clip.video:
            return (yield from decode_audio(self._info.path, start=self._info.start, duration=self._duration))
        return (yield from decode_audio(clip.audio, start=probe(clip.audio).start, duration=self._duration))

    # -- faces -----------------------------------------------------------------------------------------------------

    def _send_faces(self) -> None:
        job = self._job
        frame = nearest(self._times, job.grid.sample_times(self._duration))
        self._everyone: dict[str, np.ndarray[Any, Any]] | None = None
        self._people = 0
        self._facts: dict[str, Any] = {"samples": int(frame.size), "faces": 0, "unreadable_crops": 0}
        if self._clip.crops and job.face_source != "centerface":
            images = self._read_crops(frame)
        elif self._clip.video is not None or self._clip.frames is not None:
            images = self._detect_faces(frame)
        else:  # audio only
            images = iter(())
        for person, sample, jpeg, image in images:
            self._facts["faces"] += 1
            prepared = {preparation: preparation(image) for preparation in job.preparations}
            self._send(Face(job.number, sample, prepared, jpeg if job.keep_jpeg else None, person))
        self._send(FacesEnd(job.number, frame, self._facts, self._everyone, self._people))

    def _read_crops(self, frame: Ints) -> Images:
        """Crops by frame number, never by position. The sample of a missing or unreadable one stays invalid."""
        crops, digest = list_crops(self._clip.crops), ImageDigest()
        for sample, number in enumerate(frame.tolist()):
            if number not in crops:
                continue
            try:
                jpeg, image = read_crop(crops[number])
            except MediaError:
                self._facts["unreadable_crops"] += 1
                continue
            digest.add(number, jpeg)
            yield 0, sample, jpeg, image
        self._facts[IMAGES_DIGEST] = digest.hexdigest()

    def _detect_faces(self, frame: Ints) -> Images:
        """The face of one person, or of all. The image that is encoded is the JPEG that would be stored."""
        samples_of: dict[int, list[int]] = {}
        for sample, number in enumerate(frame.tolist()):
            samples_of.setdefault(number, []).append(sample)
        frames = self._whole_frames(np.unique(frame))
        crops: Crops
        if self._job.face_source == "none":
            crops = ((0, number, encode_jpeg(image)) for number, image in frames)
        elif self._job.person == LARGEST and not self._clip.side:
            crops = self._largest_face(frames)
        else:
            crops = self._chosen_faces(frames)
        for person, number, jpeg in crops:
            stored = decode_jpeg(jpeg)
            for sample in samples_of[number]:
                yield person, sample, jpeg, stored

    def _largest_face(self, frames: Frames) -> Crops:
        """Crops of the largest face, followed by place alone."""
        tracker = PersonTracker()
        for number, image, faces in self._detected(frames):
            face = tracker.update(faces, float(self._times[number]))
            if face is not None:
                yield 0, number, encode_jpeg(align(image, face))

    def _chosen_faces(self, frames: Frames) -> Crops:
        """Crops of the person that the settings choose, or of everyone, once all faces of the clip are known."""
        rule = self._clip.side or self._job.person
        with ClipFaces(open_network(self._job.identity)) as faces:
            for number, image, faces_in_frame in self._detected(frames):
                beat()
                faces.add(number, float(self._times[number]), image, faces_in_frame)
            people = faces.people()
            self._everyone = people.arrays()
            self._facts |= {"people": len(people.sightings), "notable": people.notable, "cuts": len(people.cuts)}
            self._facts["seconds"] = [round(seconds, 2) for seconds in people.seconds]
            if turned := quarter_turn(self._everyone["landmarks"]):
                self._facts["turned"] = turned
            if self._clip.side:
                self._facts["side"] = self._clip.side
            if self._job.keep_everyone and len(people.sightings) > 1:
                for sighting in people.rows():
                    self._send(FaceCrop(self._job.number, people.jpeg(sighting)))
            if rule == ALL:
                self._people = max(1, people.notable)  # without a face, the clip is one item without faces
                for number, sightings in enumerate(people.sightings[: self._people], start=1):
                    for sighting in sightings:
                        yield number, sighting.frame, people.jpeg(sighting)
                return
            speech = self._speech() if rule == SPEAKING else None
            person = self._facts["person"] = choose_person(self._everyone, rule, speech)
            for sighting in people.sightings[person - 1] if person else []:
                yield 0, sighting.frame, people.jpeg(sighting)

    def _speech(self) -> Speech | None:
        """Whether there is speech at a time in seconds, as it is stored; None for a clip without audio."""
        meter = SpeechMeter()
        summary = pass_on(self._audio_blocks(), meter.push)
        if summary.status in WITHOUT_AUDIO:
            return None
        return speech_at(stored_speech(meter.finish(), covered_frames(frame_count(summary.samples), summary.covered)))

    def _detected(self, frames: Frames) -> Iterator[tuple[int, Image, list[DetectedFace]]]:
        """The frames with the faces that the detector finds."""
        if self._job.ask:
            yield from find_faces(frames, partial(self._ask, self._job.number), self._job.ask)
            return
        detector = shared_detector()
        for number, image in frames:
            yield number, image, detector.detect(image)

    def _whole_frames(self, numbers: Ints) -> Frames:
        """Yield the requested frames of a video or image folder; unreadable images are skipped and counted."""
        clip = self._clip
        if clip.video is not None and self._job.decode_on:
            yield from frames_on_gpu(clip.video, numbers, self._times, self._job.decode_on)
        elif clip.video is not None:
            yield from frames_at(clip.video, numbers, self._times)
        elif clip.frames is not None:
            digest = ImageDigest()
            for number, data, image in stills_at(clip.frames, numbers):
                if image is None:
                    self._facts["unreadable_frames"] = self._facts.get("unreadable_frames", 0) + 1
                else:
                    digest.add(number, data)
                    yield number, image
            self._facts[IMAGES_DIGEST] = digest.hexdigest()


def _annotations(clip: Clip, *, everyone: bool) -> tuple[Annotation | None, dict[int, Annotation | None]]:
    """The labels of a clip, and by number those of its further people; with `everyone`, the first are of person 1.

    Raises:
        DataError: with the problems of up to three files, and how many more cannot be used.
    """
    first = 1 if everyone else 0
    numbers = [first, *(number for number, _ in clip.person_labels if number > 1 and everyone)]
    found: dict[int, Annotation | None] = {}
    problems = []
    for number in numbers:
        try:
            found[number] = read_annotation(clip, number)
        except DataError as error:
            problems.append(str(error))
    if problems:
        rest = len(problems) - LISTED
        raise DataError(" ".join([*problems[:LISTED], *([f"And {count(rest, 'more file')}."] if rest > 0 else [])]))
    return found.pop(first), found


def _annotation_facts(annotation: Annotation | None) -> dict[str, Any]:
    if annotation is None:
        return {"rows": 0, "targets": []}
    return {"rows": int(annotation.value.shape[0]), "targets": list(annotation.targets)}


class StoredReader:
    """Sends the crops of a person as messages, as `ClipReader` does for a video."""

    stage = "faces"

    def __init__(self, job: Job, send: Callable[[Message], None]) -> None:
        self._job, self._send = job, send

    def run(self) -> None:
        """Read the crops.

        Raises:
            VaflowError: the cache is damaged, or does not hold the crops.
        """
        job, stored = self._job, self._job.stored
        assert stored is not None
        source = open_once(stored.cache)
        if not source.has(CROPS, stored.item):
            remedy = "To add them, repeat its extraction without --chosen-only"
            raise MediaError(explain(f"{stored.cache} has no crops of the people of {stored.item!r}", remedy=remedy))
        duration = float(source.meta(stored.item)["duration"])
        frame = source.read(stored.stream, stored.item, ["frame"]).frame
        samples = job.grid.sample_ticks(duration).size
        if frame.size != samples:
            problem = f"{stored.cache}: the duration of {stored.item!r} does not fit its stream {stored.stream!r}"
            remedy = "Extract the video of this clip again"
            raise CorruptError(explain(problem, expected=f"{samples} samples", got=frame.size, remedy=remedy))
        self._send(Clock(job.number, {}, duration, source.record(stored.stream, stored.item).source))
        faces = source.read(FACES, stored.item, ["frame", "person"])
        images = source.read(CROPS, stored.item).images
        faces_sent = 0
        for row in np.flatnonzero(faces.person == stored.person).tolist():
            beat()
            if not images[row]:
                raise MediaError(explain(f"{stored.cache} has no crops of person {stored.person} of {stored.item!r}"))
            image = decode_jpeg(images[row])
            prepared = {preparation: preparation(image) for preparation in job.preparations}
            for sample in np.flatnonzero(frame == faces.frame[row]).tolist():
                self._send(Face(job.number, sample, prepared, images[row] if job.keep_jpeg else None))
                faces_sent += 1
        self._send(FacesEnd(job.number, frame, stored.facts | {"samples": int(frame.size), "faces": faces_sent}))
