"""What a prediction extracts: its options, the clips of media files, and the extraction settings of the runs."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.cache.schema import LOGMEL
from vaflow.datasets import log_left_out, open_dataset
from vaflow.datasets.clip import Clip
from vaflow.datasets.files import is_audio, usable
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.extract.config import DETECTORS, ExtractConfig
from vaflow.extract.faces.choice import ALL, LARGEST, MAIN
from vaflow.extract.faces.identity import AUTO, network_setting
from vaflow.item_names import clip_and_person, person_item
from vaflow.train.finetune.backbones import saved_weights
from vaflow.train.inputs import sampling
from vaflow.train.run_folder import LoadedRun, RunFolder

log = logging.getLogger(__name__)

FLOAT32 = ("onnx", "opensmile")  # encoders that ignore --precision
IMPORTED = "imported"  # encoder of streams whose features were imported


@dataclass(frozen=True)
class PredictConfig:
    """Options of a prediction.

    Attributes:
        device: "auto", "cpu" or "cuda[:N]".
        weights: encoder name -> local file or folder, instead of the hub.
        face_source: as for extraction; None: as in the run's cache, which is the only one that fits.
        cache: keep the features here and reuse them; None: delete them at the end.
        keep_features: leave the features of new videos in `PredictSummary.cache`, for `PredictSummary.discard`.
        person: whom to predict, as for extraction; None: as in the run's cache ("main" if that has everyone).
    """

    device: str = "auto"
    weights: Mapping[str, Path] = field(default_factory=dict)
    face_source: str | None = None
    cache: Path | None = None
    person: str | None = None
    keep_features: bool = False


def extraction_settings(members: Mapping[Path, LoadedRun], config: PredictConfig) -> ExtractConfig:
    """The extraction that makes every stream of the runs.

    Raises:
        UsageError: a stream was imported, the runs need different extractions, or --faces does not fit.
    """
    streams = [stream for run in members.values() for stream in run.record.head_streams]
    imported = [stream.name for stream in streams if stream.identity.get("encoder") == IMPORTED]
    if imported:
        problem = f"The run reads imported features ({', '.join(dict.fromkeys(imported))}), which no encoder here makes"
        remedy = "Import the features (vaflow cache import), then: vaflow predict RUN --cache CACHE --out DIR"
        raise UsageError(explain(problem, expected="a run on streams that `vaflow extract` makes", remedy=remedy))
    check_alike(members)
    saved: dict[str, Path] = {}  # encoders of fine-tuned runs
    for path, run in members.items():
        saved |= saved_weights(RunFolder(path).encoders, run.record.tuned)
    sampled = next(filter(None, (sampling(stream.identity) for stream in streams)), {})
    faces: list[dict[str, Any]] = [stream.identity.get("picture", {}).get("faces", {}) for stream in streams]
    runtimes = [identity.get("runtime", "") for identity in faces]
    detectors = [name for name in DETECTORS for runtime in runtimes if runtime.startswith(f"{name} ")]
    rounded = [stream for stream in streams if stream.kind != LOGMEL and stream.identity.get("encoder") not in FLOAT32]
    precisions = {stream.identity.get("precision", "auto") for stream in rounded}
    if len(precisions) > 1:
        names = ", ".join(sorted(precisions)).replace("auto", "float32")
        log.warning("The run reads streams of several precisions (%s); new videos are encoded in float32", names)
    precision = precisions.pop() if len(precisions) == 1 else "auto"
    if precision == "float16" and choose_device(config.device).type != "cuda":
        precision = "auto"
    sources = [identity["source"] for identity in faces if "source" in identity]
    trained_on = sources[0] if sources else "auto"
    if sources and config.face_source not in (None, trained_on):
        problem = f"--faces {config.face_source} does not fit the run: its features were extracted with other faces"
        raise UsageError(explain(problem, expected=f"--faces {trained_on}, which is the default"))
    trained_person = next((one.get("person", LARGEST) for one in faces if one), LARGEST)
    return ExtractConfig(
        visual=tuple(dict.fromkeys(stream.name for stream in streams if stream.kind == "visual")),
        audio=tuple(dict.fromkeys(stream.name for stream in streams if stream.kind == "audio")),
        weights={**saved, **config.weights},
        window=sampled.get("window", 10.0),
        stride=sampled.get("stride", 3.0),
        frames=int(sampled.get("frames", 20)),
        audio_steps=int(sampled.get("audio_steps", 20)),
        face_source=config.face_source or trained_on,
        device=config.device,
        precision=precision,
        person=config.person or (MAIN if trained_person == ALL else trained_person),
        identity=next((network_setting(one) for one in faces if one), AUTO),
        detector=detectors[0] if detectors else ExtractConfig.detector,
    )


def items_of(cache: Cache, clips: Sequence[str]) -> list[str]:
    """The items of clips in the cache: the clip itself, or all of its people, in the order of their numbers."""
    people: dict[str, list[int]] = {}
    items = set(cache.items())
    for item in items:
        source, number = clip_and_person(item)
        people.setdefault(source, []).append(number)
    divided = ([person_item(clip, number) for number in sorted(people.get(clip, ())) if number] for clip in clips)
    return [item for clip, each in zip(clips, divided, strict=True) for item in ([clip] if clip in items else each)]


def check_alike(members: Mapping[Path, LoadedRun]) -> None:
    """Check that one extraction serves all runs: the same encoder behind a name, and the same sampling.

    Raises:
        UsageError: two runs differ.
    """
    first: dict[str, tuple[object, Path]] = {}
    for path, run in members.items():
        for name, value in extraction_facts(run):
            other, elsewhere = first.setdefault(name, (value, path))
            if other != value:
                problem = f"The runs of this ensemble differ in {name}: one extraction cannot serve them all"
                expected = "runs on one cache, or on caches extracted with the same settings"
                remedy = "Predict with each run, and average the CSV files"
                raise UsageError(explain(problem, expected=expected, got=f"{elsewhere} and {path}", remedy=remedy))


def extraction_facts(run: LoadedRun) -> Iterator[tuple[str, object]]:
    """Name and value of every fact that an extraction for the run must have."""
    for stream in run.record.head_streams:
        if "weights" in stream.identity:
            yield f"the encoder of {stream.name}", stream.identity["weights"]
        for key, value in sampling(stream.identity).items():
            yield f"the sampling ({key})", value


def clips_of(media: Sequence[Path]) -> tuple[Clip, ...]:
    """One clip per video or audio file. Its id, and so the file name, is the stem; with the extension if two share it.

    Raises:
        UsageError: a path does not exist, a file's name cannot be that of its predictions, or two files have one name.
    """
    videos: list[Path] = []
    for path in media:
        if path.is_dir():
            dataset = open_dataset(path, "videos")
            log_left_out(dataset, skip=("split-missing", "person-labels"))  # a prediction needs neither
            videos += [clip.audio for clip in dataset.clips if clip.audio is not None]
        elif path.is_file() and not usable(path.name):
            expected = "a name in UTF-8 without a backslash, because the predictions have the same name"
            raise UsageError(explain(f"{path} has an unusable name", expected=expected, remedy="Rename the file"))
        elif path.is_file():
            videos.append(path)
        else:
            raise UsageError(explain(f"{path} does not exist", expected="a video or audio file, or a folder of them"))
    videos = list(dict.fromkeys(path.absolute() for path in videos))
    stems = Counter(path.stem for path in videos)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in videos]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        problem = "Two videos would write the same files"
        remedy = "Predict them in two calls with different --out"
        raise UsageError(explain(problem, expected="videos with different file names", got=repeated[0], remedy=remedy))
    pairs = zip(names, videos, strict=True)
    return tuple(Clip(name, None, name, None if is_audio(path.name) else path, path) for name, path in pairs)
