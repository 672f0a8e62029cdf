"""Assembly of one clip: takes the worker's messages, queues rows for the encoders, collects the results.

Audio becomes frames of every filter bank that an encoder reads, each fed once, with masks of frames and steps.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache import Cache
from vaflow.cache.schema import CROPS, FACES, LABELS, LOGMEL, PIXELS, Rows, StreamInfo, stored_layers
from vaflow.cache.scratch import LongArray, Scratch
from vaflow.datasets.clip import person_item
from vaflow.encoders.base import KALDI, FrontEnd, cut
from vaflow.encoders.logmel import RATE, frame_times
from vaflow.extract.audio import HOP, METHOD, SpeechMeter, covered_frames, step_valid, stored_speech
from vaflow.extract.config import ExtractConfig
from vaflow.extract.decoding_pool import AudioBlock, AudioEnd, Clock, Done, Face, FaceCrop, FacesEnd, Message
from vaflow.extract.encoding import Encoders, FixedBatcher
from vaflow.extract.faces.crops import turn_remedy
from vaflow.extract.faces.people import no_faces
from vaflow.extract.plan import PendingClip
from vaflow.timeline import Floats, Ints

logger = logging.getLogger(__name__)

# Kind of stream -> the facts in its records.
FACTS_OF = {name: name for name in ("labels", "logmel", "audio", "faces")}
FACTS_OF |= {"crops": "faces", "visual": "visual", "pixels": "visual"}
Arrays = dict[str, Rows]
Vectors = NDArray[Any] | LongArray  # [N, dim], written to by rows


def vector_shape(info: StreamInfo) -> tuple[int, ...]:
    """Return [dim], or [layers, dim] where several layers of the encoder are stored."""
    layers = stored_layers(info)
    return (layers, info.dim) if layers else (info.dim,)


class PersonRows:
    """Visual streams and pixels of one person.

    Args:
        times: [T] seconds of the grid samples.
        shapes: visual stream -> shape of one row.
    """

    def __init__(self, times: Floats, shapes: Mapping[str, tuple[int, ...]], dtype: str, scratch: Scratch) -> None:
        self._times = times
        self.vectors: dict[str, Vectors] = {
            name: scratch.zeros((len(times), *shape), dtype) for name, shape in shapes.items()
        }
        self.has_face = np.zeros(len(times), bool)
        self._jpegs = scratch.growing((), "uint8")
        self._sizes = np.zeros(len(times), np.int64)

    def add(self, sample: int, jpeg: bytes | None) -> None:
        """A sample shows the person; samples ascend."""
        self.has_face[sample] = True
        if jpeg is not None:
            self._jpegs.append(np.frombuffer(jpeg, np.uint8))
            self._sizes[sample] = len(jpeg)

    def arrays(self, frame: Ints, *, pixels: bool) -> dict[str, Arrays]:
        """The arrays of every visual stream, and of the pixels. Call once, at the end.

        Args:
            frame: [T] video frame of every sample.
            pixels: whether the crops were kept.
        """
        made: dict[str, Arrays] = {
            name: {"embedding": rows, "time": self._times, "valid": self.has_face, "frame": frame}
            for name, rows in self.vectors.items()
        }
        if pixels:
            made[PIXELS] = {
                "data": self._jpegs.finish(),
                "offset": np.concatenate([[0], np.cumsum(self._sizes)]),
                "time": self._times,
                "valid": self._sizes > 0,
                "frame": frame,
            }
        return made


def _no_crops(faces: int) -> Arrays:
    return {"data": np.zeros(0, np.uint8), "offset": np.zeros(faces + 1, np.int64)}


class ClipAssembly:
    """State of one clip.

    Args:
        cache: allocates the arrays, so that a clip of any length takes bounded memory; and holds the log-Mel of a clip
            to which only audio streams are added.
    """

    def __init__(
        self,
        task: PendingClip,
        config: ExtractConfig,
        infos: Mapping[str, StreamInfo],
        encoders: Encoders,
        cache: Cache,
    ) -> None:
        self.task, self._config, self._infos = task, config, infos
        self._visual = {name: pair for name, pair in encoders.visual.items() if name in task.streams}
        self._audio = {name: pair for name, pair in encoders.audio.items() if name in task.streams}
        self._cache, self._scratch = cache, cache.scratch
        self.sources: dict[str, Any] = {}
        self.facts: dict[str, dict[str, Any]] = {"labels": {}, "logmel": {}, "audio": {}, "visual": {}, "faces": {}}
        self.arrays: dict[str, Arrays] = {}
        self.duration, self.label_problem = 0.0, ""
        front_ends = {encoder.front_end for encoder, _ in self._audio.values()} - {KALDI}
        if LOGMEL in task.streams:
            front_ends.add(KALDI)
        # The log-Mel is encoded from its stored form; frames of other front ends are dropped once they are encoded.
        self._speech = SpeechMeter() if LOGMEL in task.streams else None
        self._banks = {front: front.open() for front in front_ends}
        self._frames = {  # of every front end
            front: self._scratch.growing((front.bins,), config.dtype if front == KALDI else "float32")
            for front in front_ends
        }
        self._crops, self._crop_sizes = self._scratch.growing((), "uint8"), [0]
        self._rows: dict[int, PersonRows] = {}  # by number of the person; 0: the clip is one item
        self._visual_arrays: dict[int, dict[str, Arrays]] = {}
        self._labels: Mapping[int, tuple[Arrays, dict[str, Any]]] = {}
        self._sizes: dict[str, set[int]] = {}
        self._waiting = 0
        self._read = False
        self._times: Floats = np.zeros(0)
        self._audio_seconds, self._last_sample = 0.0, -1

    @property
    def complete(self) -> bool:
        """Whether everything has been read and every row is encoded."""
        return self._read and self._waiting == 0

    def made_in(self, stream: str) -> dict[str, Any]:
        """Batch sizes, device and compilation: what an embedding's last bits depend on besides its fingerprint.

        Empty for streams without encoded rows.
        """
        sizes = self._sizes.get(stream)
        if not sizes:
            return {}
        _, batcher = (self._visual | self._audio)[stream]
        compiled = {"compiled": True} if self._config.compile else {}
        return {"batch": sorted(sizes), "device": batcher.device.type} | compiled

    @property
    def people(self) -> int:
        """Number of people, if every person becomes an item; else 0."""
        return max(self._visual_arrays, default=self.task.people)

    def items(self) -> Iterator[tuple[str, dict[str, tuple[Arrays, dict[str, Any]]]]]:
        """Each item with the arrays and facts of its streams, the first person last. Call once, when complete."""
        if unused := [number for number in sorted(self._labels) if number > self.people]:
            tables = ", ".join(f"{person_item(self.task.clip.id, number)}.csv" for number in unused)
            logger.warning("%s: %d people found; labels not used: %s", self.task.clip.id, self.people, tables)
        for number in range(self.people, 0, -1) if self.task.everyone else (0,):
            arrays = self.arrays | self._visual_arrays.get(number, {})
            facts = {name: self.facts[FACTS_OF[self._infos[name].kind]] for name in arrays}
            if number:
                rows = self._rows.get(number)
                person = {"clip": self.task.clip.id, "person": number, "persons": self.people}
                for name in facts.keys() - {FACES, CROPS}:
                    faces = {"faces": int(rows.has_face.sum())} if rows and "faces" in facts[name] else {}
                    facts[name] = facts[name] | faces | person
                if number > 1 and CROPS in arrays:
                    arrays[CROPS] = _no_crops(len(arrays[CROPS]["offset"]) - 1)  # person 1 has them
                if number > 1 and LABELS in arrays:
                    arrays[LABELS], arrays_of_labels = self._labels_of(number)
                    facts[LABELS] = facts[LABELS] | arrays_of_labels
            item = person_item(self.task.clip.id, number) if number else self.task.clip.id
            yield item, {name: (arrays[name], facts[name]) for name in self.task.streams}

    def _labels_of(self, number: int) -> tuple[Arrays, dict[str, Any]]:
        """Labels of a person after the first; those of a person without any are empty."""
        if number in self._labels:
            return self._labels[number]
        labels = self.arrays[LABELS]
        empty = {"value": np.full_like(labels["value"], np.nan), "valid": np.zeros_like(labels["valid"])}
        return labels | empty, {"rows": 0, "targets": []}

    @property
    def share_read(self) -> float:
        """Share of the clip that has been read, 0 to 1; faces, where they are read, take the second half."""
        audio = min(self._audio_seconds / max(self.duration, 1e-9), 1.0)
        faces = (self._last_sample + 1) / max(len(self._times), 1)
        return max((audio + faces) / 2, 1.0 if self._read else 0.0)

    def take(self, message: Message) -> None:
        """Take one message of this clip, in order."""
        match message:
            case Clock():
                self._start(message)
            case AudioBlock():
                self._audio_seconds += message.samples.size / RATE
                for front, bank in self._banks.items():
                    self._frames[front].append(bank.push(message.samples))
                if self._speech is not None:
                    self._speech.push(message.samples)
            case AudioEnd():
                self._end_audio(message)
            case Face():
                self._add_face(message)
            case FaceCrop():
                self._crops.append(np.frombuffer(message.jpeg, np.uint8))
                self._crop_sizes.append(len(message.jpeg))
            case FacesEnd():
                self._end_faces(message)
            case Done():
                self._read = True

    def _start(self, clock: Clock) -> None:
        self.sources, self.duration, self.label_problem = clock.sources, clock.duration, clock.label_problem
        self.facts["labels"] = clock.facts
        if clock.facts.get("transfer"):
            logger.warning("%s: %s video is read without tone mapping", self.task.clip.id, clock.facts["transfer"])
        if LABELS in self.task.streams:
            self.arrays[LABELS] = dict(clock.labels)
        self._labels = clock.people
        self._times = self._config.grid.sample_times(clock.duration)
        if not self.task.everyone:
            self._rows[0] = self._new_rows()
        reads_logmel = any(encoder.front_end == KALDI for encoder, _ in self._audio.values())
        if reads_logmel and LOGMEL not in self.task.streams:
            stored = self._cache.read(LOGMEL, self.task.first_item)
            self.facts["audio"] = {name: fact for name, fact in stored.meta.items() if name.startswith("audio")}
            self._encode_audio(KALDI, stored.embedding, stored.valid)

    # -- audio ---------------------------------------------------------------------------------------------------

    def _end_audio(self, end: AudioEnd) -> None:
        self.facts["audio"] = end.facts
        for front in self._banks:
            frames = self._frames.pop(front).finish()
            valid = covered_frames(len(frames), end.covered)
            if front == KALDI:
                self.arrays[LOGMEL] = {"embedding": frames, "time": frame_times(len(frames)), "valid": valid}
                if self._speech is not None:
                    self.arrays[LOGMEL]["speech"] = stored_speech(self._speech.finish(), valid)
                    self.facts["logmel"] = self.facts["audio"] | {"speech": METHOD}
            self._encode_audio(front, frames, valid)

    def _encode_audio(self, front: FrontEnd, frames: Rows, valid: NDArray[np.bool_]) -> None:
        """Encode the frames of one front end with every encoder that reads it."""
        for name, (encoder, _) in self._audio.items():
            if encoder.front_end == front:
                self._encode_windows(name, frames, valid)

    def _encode_windows(self, name: str, frames: Rows, valid: NDArray[np.bool_]) -> None:
        """Queue every segment that a window reads, once; segments without audio under any step are left out."""
        encoder, batcher = self._audio[name]
        grid, steps = self._config.grid, self._config.audio_steps
        starts = grid.seconds(grid.starts(self.duration))
        has_audio = step_valid(valid, starts, grid.window, steps, self.duration)
        shape = vector_shape(self._infos[name])
        vectors = self._scratch.zeros((len(starts) * steps, *shape), self._config.dtype)
        self.arrays[name] = {
            "embedding": vectors.reshape(len(starts), steps, *shape),
            "time": starts[:, None] + encoder.step_times(grid.window, steps),
            "valid": has_audio,
            "start": starts,
        }
        segments = encoder.segments(grid.window, steps)
        each = steps // len(segments.first)
        readers: dict[int, list[int]] = {}  # first frame -> places of its result: the first of `each` vectors
        for window, start in enumerate(starts.tolist()):
            for number, offset in enumerate(segments.first):
                if has_audio[window, number * each : (number + 1) * each].any():
                    readers.setdefault(round(start / HOP) + offset, []).append(window * steps + number * each)
        for first, targets in readers.items():
            row = cut(frames, first, segments.frames, encoder.front_end.padding)
            self._encode(name, batcher, row, vectors, targets, each)

    # -- faces ---------------------------------------------------------------------------------------------------

    def _new_rows(self) -> PersonRows:
        shapes = {name: vector_shape(self._infos[name]) for name in self._visual}
        return PersonRows(self._times, shapes, self._config.dtype, self._scratch)

    def _add_face(self, face: Face) -> None:
        self._last_sample = face.sample
        if face.person not in self._rows:
            self._rows[face.person] = self._new_rows()
        rows = self._rows[face.person]
        rows.add(face.sample, face.jpeg)
        for name, (encoder, batcher) in self._visual.items():
            row = face.images[encoder.preparation]
            self._encode(name, batcher, row, rows.vectors[name], [face.sample], 1)

    def _end_faces(self, end: FacesEnd) -> None:
        self.facts["visual"] = end.facts
        if turned := end.facts.get("turned"):
            logger.warning(
                "%s: most faces are turned by %d degrees. %s", self.task.clip.id, turned, turn_remedy(turned)
            )
        stated = ("people", "notable", "seconds", "cuts", "side")
        self.facts["faces"] = {name: end.facts[name] for name in stated if name in end.facts}
        faces = no_faces() if end.everyone is None else end.everyone
        if FACES in self.task.streams:
            self.arrays[FACES] = dict(faces)
        if CROPS in self.task.streams:
            self.arrays[CROPS] = _no_crops(len(faces["time"]))
            if len(self._crop_sizes) > 1:
                self.arrays[CROPS] = {"data": self._crops.finish(), "offset": np.cumsum(self._crop_sizes)}
        for number in range(1, end.people + 1) if self.task.everyone else (0,):
            if number not in self._rows:
                self._rows[number] = self._new_rows()
            self._visual_arrays[number] = self._rows[number].arrays(end.frame, pixels=PIXELS in self.task.streams)

    def _encode(
        self, stream: str, batcher: FixedBatcher, row: NDArray[Any], vectors: Vectors, targets: list[int], each: int
    ) -> None:
        """Queue a row; its result, `each` vectors, is written into `vectors` at every target."""
        self._waiting += 1
        sizes = self._sizes.setdefault(stream, set())

        def deliver(result: NDArray[np.float32]) -> None:
            for target in targets:
                vectors[target : target + each] = result
            sizes.add(batcher.delivering)
            self._waiting -= 1

        batcher.add(row, deliver)
