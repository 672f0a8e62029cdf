"""One clip on its way into the cache: takes the workers' messages, sends rows to the encoders, gathers the results."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, StreamInfo
from vaflow.encoders.frontend import KALDI, FrontEnd, cut
from vaflow.encoders.logmel import frame_times
from vaflow.extract.batching import Encoders, FixedBatcher
from vaflow.extract.config import ExtractConfig
from vaflow.extract.messages import Clock, Done, Face, FacesEnd, Message, Sound, SoundEnd
from vaflow.extract.plan import Task
from vaflow.extract.sound import HOP, Banks, covered_frames, step_valid
from vaflow.timeline import Floats

Arrays = dict[str, NDArray[Any]]
LogMel = tuple[NDArray[Any], NDArray[np.bool_], dict[str, Any]]  # [F, mel] as stored, [F] valid, facts of the sound


class ClipAssembly:
    """Everything known of one clip so far.

    Args:
        task: the clip and the streams that it lacks.
        config: settings of the run.
        infos: every stream by name.
        encoders: every encoder of the run with its batcher.
        cached_logmel: reads the clip's committed log-Mel, where only audio streams are added to it.
    """

    def __init__(
        self,
        task: Task,
        config: ExtractConfig,
        infos: Mapping[str, StreamInfo],
        encoders: Encoders,
        cached_logmel: Callable[[str], LogMel],
    ) -> None:
        self.task, self._config, self._infos = task, config, infos
        self._visual = {name: pair for name, pair in encoders.visual.items() if name in task.streams}
        self._audio = {name: pair for name, pair in encoders.audio.items() if name in task.streams}
        self._cached_logmel = cached_logmel
        self.sources: dict[str, Any] = {}
        self.facts: dict[str, dict[str, Any]] = {"labels": {}, "audio": {}, "visual": {}}
        self.arrays: dict[str, Arrays] = {}
        self.duration = 0.0
        wanted = {encoder.front_end for encoder, _ in self._audio.values()} - {KALDI}
        if LOGMEL in task.streams:
            wanted.add(KALDI)
        # The log-Mel is kept, and read, as it is stored; other frames are forgotten once they are encoded.
        self._banks = Banks(wanted, {KALDI: np.dtype(config.dtype)})
        self._jpegs: dict[int, bytes] = {}
        self._sizes: dict[str, set[int]] = {}
        self._waiting = 0
        self._read = False

    @property
    def complete(self) -> bool:
        """Everything has been read, and every row has come back from its encoder."""
        return self._read and self._waiting == 0

    def made_in(self, stream: str) -> dict[str, Any]:
        """What an embedding's last bits depend on besides its fingerprint: the sizes of the batches, the device.

        Empty for streams that nothing was encoded for.
        """
        sizes = self._sizes.get(stream)
        if not sizes:
            return {}
        _, batcher = (self._visual | self._audio)[stream]
        return {"batch": sorted(sizes), "device": batcher.device.type}

    def take(self, message: Message) -> None:
        """Take one message of this clip, in order."""
        match message:
            case Clock():
                self._start(message)
            case Sound():
                self._banks.push(message.samples)
            case SoundEnd():
                self._end_sound(message)
            case Face():
                self._add_face(message)
            case FacesEnd():
                self._end_faces(message)
            case Done():
                self._read = True

    def _start(self, clock: Clock) -> None:
        self.sources, self.duration = clock.sources, clock.duration
        self.facts["labels"] = clock.facts
        if LABELS in self.task.streams:
            self.arrays[LABELS] = clock.labels
        self._times = self._config.grid.sample_times(clock.duration)
        for name in self._visual:
            self.arrays[name] = self._empty_visual(name)
        reads_logmel = any(encoder.front_end == KALDI for encoder, _ in self._audio.values())
        if reads_logmel and LOGMEL not in self.task.streams:
            frames, valid, self.facts["audio"] = self._cached_logmel(self.task.clip.id)
            self._encode_sound(KALDI, frames, valid)

    # -- sound ---------------------------------------------------------------------------------------------------

    def _end_sound(self, end: SoundEnd) -> None:
        self.facts["audio"] = end.facts
        for front, frames in self._banks.finish().items():
            valid = covered_frames(len(frames), end.covered)
            if front == KALDI:
                self.arrays[LOGMEL] = {"embedding": frames, "time": frame_times(len(frames)), "valid": valid}
            self._encode_sound(front, frames, valid)

    def _encode_sound(self, front: FrontEnd, frames: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Encode the frames of one front end with every encoder that reads it."""
        for name, (encoder, _) in self._audio.items():
            if encoder.front_end == front:
                self.arrays[name] = self._encode_windows(name, frames, valid)

    def _encode_windows(self, name: str, frames: NDArray[Any], valid: NDArray[np.bool_]) -> Arrays:
        """Queue every stretch that some window reads, once; without sound under any of its steps it is left out."""
        encoder, batcher = self._audio[name]
        grid, steps = self._config.grid, self._config.audio_steps
        starts = grid.seconds(grid.starts(self.duration))
        arrays: Arrays = {
            "embedding": np.zeros((len(starts), steps, encoder.dim), self._config.dtype),
            "time": starts[:, None] + encoder.step_times(grid.window, steps),
            "valid": step_valid(valid, starts, grid.window, steps),
            "start": starts,
        }
        stretches = encoder.stretches(grid.window, steps)
        each = steps // len(stretches.first)
        readers: dict[int, list[NDArray[Any]]] = {}  # first frame -> where its result goes
        for window, start in enumerate(starts.tolist()):
            for number, offset in enumerate(stretches.first):
                part = slice(number * each, (number + 1) * each)
                if arrays["valid"][window, part].any():
                    readers.setdefault(round(start / HOP) + offset, []).append(arrays["embedding"][window, part])
        for first, targets in readers.items():
            row = cut(frames, first, stretches.frames, encoder.front_end.padding)
            self._encode(name, batcher, row, targets)
        return arrays

    # -- picture -------------------------------------------------------------------------------------------------

    def _empty_visual(self, name: str) -> Arrays:
        count = len(self._times)
        return {
            "embedding": np.zeros((count, self._infos[name].dim), self._config.dtype),
            "time": self._times,
            "valid": np.zeros(count, bool),
        }

    def _add_face(self, face: Face) -> None:
        if face.jpeg is not None:
            self._jpegs[face.sample] = face.jpeg
        for name, (encoder, batcher) in self._visual.items():
            arrays = self.arrays[name]
            arrays["valid"][face.sample] = True
            target = arrays["embedding"][face.sample : face.sample + 1]
            self._encode(name, batcher, face.images[encoder.preparation], [target])

    def _end_faces(self, end: FacesEnd) -> None:
        self.facts["visual"] = end.facts
        for name in self._visual:
            self.arrays[name]["frame"] = end.frame
        if PIXELS in self.task.streams:
            self.arrays[PIXELS] = _pixel_arrays(self._jpegs, self._times) | {"frame": end.frame}
        self._jpegs = {}

    def _encode(self, stream: str, batcher: FixedBatcher, row: NDArray[Any], targets: list[NDArray[Any]]) -> None:
        """Queue a row; its result is written into every target (views of the arrays to be committed)."""
        self._waiting += 1
        sizes = self._sizes.setdefault(stream, set())

        def deliver(result: NDArray[np.float32]) -> None:
            for target in targets:
                target[:] = result
            sizes.add(batcher.delivering)
            self._waiting -= 1

        batcher.add(row, deliver)


def _pixel_arrays(jpegs: dict[int, bytes], times: Floats) -> Arrays:
    images = [jpegs.get(sample, b"") for sample in range(len(times))]
    return {
        "data": np.frombuffer(b"".join(images), np.uint8),
        "offset": np.cumsum([0, *(len(image) for image in images)], dtype=np.int64),
        "time": times,
        "valid": np.array([bool(image) for image in images], bool),
    }
