"""One clip on its way into the cache: takes the workers' messages, sends rows to the encoders, gathers the results."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, StreamInfo
from vaflow.encoders import logmel
from vaflow.encoders.logmel import MEL_BINS, FilterBank, frame_times
from vaflow.extract.batching import Encoders, FixedBatcher
from vaflow.extract.config import ExtractConfig
from vaflow.extract.messages import Clock, Done, Face, FacesEnd, Message, Sound, SoundEnd
from vaflow.extract.plan import Task
from vaflow.timeline import Floats, Ints

Arrays = dict[str, NDArray[Any]]
LogMel = tuple[NDArray[Any], NDArray[np.bool_]]  # [F, mel] as stored, [F] valid

HOP = logmel.HOP / logmel.RATE  # seconds between two filter-bank frames
FRAME = logmel.FRAME / logmel.RATE  # seconds that one covers


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
        self._mel = FilterBank()
        self._mel_blocks: list[NDArray[Any]] = []
        self._jpegs: dict[int, bytes] = {}
        self._waiting = 0
        self._read = False

    @property
    def complete(self) -> bool:
        """Everything has been read, and every row has come back from its encoder."""
        return self._read and self._waiting == 0

    def take(self, message: Message) -> None:
        """Take one message of this clip, in order."""
        match message:
            case Clock():
                self._start(message)
            case Sound():
                self._add_mel(self._mel.push(message.samples))
            case SoundEnd():
                self._add_mel(self._mel.finish())
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
        if self._audio and LOGMEL not in self.task.streams:
            self._encode_windows(*self._cached_logmel(self.task.clip.id))

    # -- sound ---------------------------------------------------------------------------------------------------

    def _add_mel(self, frames: NDArray[np.float32]) -> None:
        if len(frames):
            self._mel_blocks.append(frames.astype(self._config.dtype))

    def _end_sound(self, end: SoundEnd) -> None:
        self.facts["audio"] = end.facts
        blocks, self._mel_blocks = self._mel_blocks, []
        mel = np.concatenate(blocks) if blocks else np.zeros((0, MEL_BINS), self._config.dtype)
        valid = _covered(len(mel), end.covered)
        if LOGMEL in self.task.streams:
            self.arrays[LOGMEL] = {"embedding": mel, "time": frame_times(len(mel)), "valid": valid}
        self._encode_windows(mel, valid)

    def _encode_windows(self, mel: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Slice the log-Mel, as stored, into windows; those with no sound under any step are not encoded."""
        grid, steps = self._config.grid, self._config.audio_steps
        starts = grid.seconds(grid.starts(self.duration))
        for name, (encoder, batcher) in self._audio.items():
            times = starts[:, None] + encoder.step_times(grid.window, steps)
            arrays = {
                "embedding": np.zeros((len(starts), steps, encoder.dim), self._config.dtype),
                "time": times,
                "valid": _step_valid(valid, starts, grid.window, steps),
                "start": starts,
            }
            self.arrays[name] = arrays
            frames = encoder.window_frames(grid.window)
            for window in np.flatnonzero(arrays["valid"].any(axis=1)).tolist():
                first = round(float(starts[window]) / HOP)
                row = np.zeros((frames, mel.shape[1]), np.float32)
                part = mel[first : first + frames]
                row[: len(part)] = part
                self._encode(batcher, row, arrays, window)

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
            self._encode(batcher, face.images[encoder.preparation], arrays, face.sample)

    def _end_faces(self, end: FacesEnd) -> None:
        self.facts["visual"] = end.facts
        for name in self._visual:
            self.arrays[name]["frame"] = end.frame
        if PIXELS in self.task.streams:
            self.arrays[PIXELS] = _pixel_arrays(self._jpegs, self._times) | {"frame": end.frame}
        self._jpegs = {}

    def _encode(self, batcher: FixedBatcher, row: NDArray[Any], arrays: Arrays, where: int) -> None:
        self._waiting += 1

        def deliver(result: NDArray[np.float32]) -> None:
            arrays["embedding"][where] = result.astype(arrays["embedding"].dtype)
            self._waiting -= 1

        batcher.add(row, deliver)


def _covered(frames: int, covered: tuple[tuple[float, float], ...]) -> NDArray[np.bool_]:
    """[F] True where all samples of a filter-bank frame came from the file."""
    first = np.arange(frames) * HOP
    valid = np.zeros(frames, bool)
    slack = HOP / 2  # resampling rounds the ends of the sound by a fraction of a sample
    for start, stop in covered:
        valid |= (first >= start - slack) & (first + FRAME <= stop + slack)
    return valid


def _step_valid(valid: NDArray[np.bool_], starts: Floats, window: float, steps: int) -> NDArray[np.bool_]:
    """[W, S] True where at least half of the log-Mel frames under a step are valid."""
    sums = np.concatenate([[0], np.cumsum(valid)])
    edges = starts[:, None] + np.arange(steps + 1) * window / steps
    index: Ints = np.rint(edges / HOP).astype(np.int64)
    counts = np.diff(sums[np.clip(index, 0, len(valid))], axis=1)
    result: NDArray[np.bool_] = counts * 2 >= np.maximum(np.diff(index, axis=1), 1)
    return result


def _pixel_arrays(jpegs: dict[int, bytes], times: Floats) -> Arrays:
    images = [jpegs.get(sample, b"") for sample in range(len(times))]
    return {
        "data": np.frombuffer(b"".join(images), np.uint8),
        "offset": np.cumsum([0, *(len(image) for image in images)], dtype=np.int64),
        "time": times,
        "valid": np.array([bool(image) for image in images], bool),
    }
