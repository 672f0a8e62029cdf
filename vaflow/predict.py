"""Prediction of valence and arousal for every frame of new videos, or of a cache's clips.

New videos are extracted into a cache first, with the settings that the runs require; the two
stages meet here and in `vaflow.demo` only.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.cache.schema import LOGMEL
from vaflow.datasets import Dataset, log_left_out, open_dataset
from vaflow.datasets.clip import Clip, clip_and_person, person_item
from vaflow.datasets.files import below, is_audio, usable
from vaflow.device import choose_device
from vaflow.encoders import demonstration_notice, warn_of_demonstration
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.extract.config import DETECTORS, ExtractConfig
from vaflow.extract.faces.choice import ALL, LARGEST, MAIN
from vaflow.extract.faces.identity import AUTO, network_setting
from vaflow.extract.pipeline import extract
from vaflow.files import FAILURES, Failure, FailureLog, lock_folder, write_file
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train import plots
from vaflow.train.batch import VISUAL
from vaflow.train.data import load_windows
from vaflow.train.ensemble import ensemble_traces, maker_of, members_of, warn_of_changed_members
from vaflow.train.evaluate import read_for
from vaflow.train.finetune.backbones import saved_weights
from vaflow.train.inputs import sampling
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.prediction_files import (
    frame_columns,
    prediction_csv,
    refuse_foreign_tables,
    warn_of_earlier_predictions,
    with_earlier_predictions,
    write_sources,
)
from vaflow.train.run_folder import LoadedRun, RunFolder, load_run, local_run
from vaflow.train.scores import featureless
from vaflow.train.traces import Trace

log = logging.getLogger(__name__)

FLOAT32 = ("onnx", "opensmile")  # encoders that ignore --precision
IMPORTED = "imported"  # encoder of streams whose features were imported
CLIPS_AT_A_TIME = 32
COMMAND = "vaflow predict"  # in messages about the lock of an output directory
FEATURES = ".features-"  # in the output directory while videos are extracted; then the digest of the settings


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


@dataclass(frozen=True)
class Predicted:
    """One clip's files and summary.

    Attributes:
        csv: a row per frame; png: both traces.
        means, spreads: dimension -> mean and standard deviation over the clip.
        regions: name -> share of the frames.
        without_face, without_audio: seconds; None where the run reads no such stream.
        stds: dimension -> mean standard deviation of the prediction; empty without a variance head.
        far: share of the frames that are far from the training features; None: unknown.
        interpolated: share of the frames between two samples of the model; None: unknown.
    """

    item: str
    csv: Path
    png: Path
    frames: int
    means: Mapping[str, float]
    spreads: Mapping[str, float] = field(default_factory=dict)
    regions: Mapping[str, float] = field(default_factory=dict)
    without_face: float | None = None
    without_audio: float | None = None
    stds: Mapping[str, float] = field(default_factory=dict)
    far: float | None = None
    interpolated: float | None = None


@dataclass(frozen=True)
class PredictSummary:
    """Predicted clips, and failures.

    Attributes:
        cache: the cache of the features, if it still exists; `temporary`: folders that `discard` deletes.
    """

    predicted: tuple[Predicted, ...]
    failures: tuple[Failure, ...]
    failures_file: Path
    cache: Path | None = None
    temporary: tuple[Path, ...] = ()

    def discard(self) -> None:
        """Delete the features of new videos that no --cache keeps.

        Another prediction into the same folder, which has begun since, deletes them at its end.
        """
        for features in self.temporary:
            with suppress(UsageError), lock_folder(features.parent, COMMAND):
                shutil.rmtree(features, ignore_errors=True)


def predict_media(
    run: Path, media: Sequence[Path], out: Path, config: PredictConfig | None = None, *, show_progress: bool = False
) -> PredictSummary:
    """Predict every frame of videos, or of a cache's clips: `out/<stem>.csv` and `out/<stem>.png` each.

    After an interruption, the same call resumes: `out` keeps the features of the clips that were extracted and
    the files of those that were predicted.

    Args:
        run: folder of a run, an exported run or an ensemble, or `hf:USER/NAME`; its encoders are run on the videos.
        media: videos, or folders that are searched for videos; empty: all clips of `config.cache`.
        out: made if missing. Failed clips are listed in `out/failures.jsonl` and do not stop the others.

    Raises:
        UsageError: the run or a video does not exist, the run reads imported features and `media` is given, or the
            runs of an ensemble cannot share one extraction, or another prediction writes to `out`.
        FingerprintError: the weights of an encoder, or the streams of the cache, are not those of the run.
    """
    config = config or PredictConfig()
    if not media and config.cache is None:
        raise UsageError(explain("Nothing to predict", expected="videos, or --cache CACHE to predict its clips"))
    device = choose_device(config.device)
    run = local_run(run)
    runs, weights = members_of(run)
    members = {path: load_run(path, device) for path in runs}
    warn_of_changed_members(run)
    settings = extraction_settings(members, config) if media else None
    warn_of_demonstration(stream.name for member in members.values() for stream in member.record.streams)
    for path, member in members.items():
        for name in member.record.untrained:
            log.warning("%s was trained without %s labels; ignore its %s predictions", path, name, name)
    clips = clips_of(media)
    check_output(out)
    with lock_folder(out, COMMAND):
        features = ClipFeatures.of(clips, settings, out, config, show_progress)
        predicted = write_clips(run, members, weights, features, show_progress)
        sources = {clip.id: clip.audio for clip in features.clips if clip.audio is not None}
        videos = {item: sources[source] for item in features.items if (source := clip_and_person(item)[0]) in sources}
        videos |= {item: sources[item] for item in features.items if item in sources}
        write_sources(out, maker_of(run), features.cache, [clip.item for clip in predicted], videos)
        summary = features.summary(predicted, config)
    if not config.keep_features:
        summary.discard()
    return summary


def check_output(out: Path) -> None:
    """Check that `out` belongs neither to a cache nor to a run, whose files would mix with predictions.

    Raises:
        UsageError: it is one.
    """
    kind = "a cache" if is_cache(out) else "a run directory" if RunFolder(out).config_file.exists() else ""
    if kind:
        raise UsageError(explain(f"{out} is {kind}", expected="another directory for the predictions"))


@dataclass(frozen=True)
class ClipFeatures:
    """The features to predict: those of `clips`, or all `items` of a cache; predictions and failures go to `out`."""

    out: Path
    clips: tuple[Clip, ...]
    cache: Cache
    items: list[str]
    failures: FailureLog

    @classmethod
    def of(
        cls,
        clips: tuple[Clip, ...],
        settings: ExtractConfig | None,
        out: Path,
        config: PredictConfig,
        show_progress: bool,
    ) -> "ClipFeatures":
        """Open the cache of the features; with `settings`, extract those of `clips` first. `out` is a folder.

        Without `config.cache`, they are in a hidden folder in `out`, one per settings, which an interrupted prediction
        leaves for the next call.

        Raises:
            UsageError: `out` holds label tables, which predictions would replace; or there are no clips to predict.
        """
        refuse_foreign_tables(out, [clip.id for clip in clips])
        failures = FailureLog(out / FAILURES)
        folder = config.cache
        if settings is not None:
            folder = folder or out / f"{FEATURES}{blake2b(repr(settings).encode(), digest_size=8).hexdigest()}"
            root = clips[0].audio.parent if clips and clips[0].audio is not None else Path()
            dataset = Dataset(root, "videos", clips, ())
            interrupted = folder.exists()
            try:
                extracted = extract(dataset, folder, settings, show_progress=show_progress)
            except FingerprintError:
                if config.cache is not None or not interrupted:
                    raise
                shutil.rmtree(folder)  # left by a prediction with other weights under the same path
                extracted = extract(dataset, folder, settings, show_progress=show_progress)
            for failure in extracted.failures:
                failures.add(with_earlier_predictions(out, failure), quiet=True)
        assert folder is not None, "videos or a cache"
        cache = open_cache(folder)
        if settings is None and not cache.items():
            raise UsageError(explain(f"{cache.place} has no clips to predict"))
        failed = {failure.item for failure in failures.failures}
        items = items_of(cache, [clip.id for clip in clips if clip.id not in failed]) if settings else cache.items()
        refuse_foreign_tables(out, items)
        return cls(out, clips, cache, items, failures)

    def add_failure(self, item: str) -> None:
        """List a clip as failed whose features are all missing."""
        failure = Failure(item, "predict", "DataError", "The cache has no features of this clip")
        self.failures.add(with_earlier_predictions(self.out, failure))

    def summary(self, predicted: Sequence[Predicted], config: PredictConfig) -> PredictSummary:
        """Return the counts of the prediction."""
        temporary = () if config.cache is not None else tuple(self.out.glob(f"{FEATURES}*"))
        failures = tuple(self.failures.failures)
        warn_of_earlier_predictions(self.out, failures)
        return PredictSummary(tuple(predicted), failures, self.failures.path, self.cache.path, temporary)


def write_clips(
    run: Path, members: Mapping[Path, LoadedRun], weights: Floats, features: ClipFeatures, show_progress: bool
) -> list[Predicted]:
    """Write the files of every clip: the weighted mean of the runs of `run`; `weights` is [N, 2], a row per run.

    Clips are predicted in batches: an interruption keeps the files of the batches before it.
    """
    predicted = []
    note = demonstration_notice(stream.name for member in members.values() for stream in member.record.streams)
    batches = [features.items[k : k + CLIPS_AT_A_TIME] for k in range(0, len(features.items), CLIPS_AT_A_TIME)]
    for batch in tqdm(batches, desc="predicting", unit="batch", disable=not show_progress, leave=False):
        traces, empty = [], set(batch)
        for path, member in members.items():
            device = next(member.model.parameters()).device
            windows = read_for(
                path, member.record, features.cache, partial(load_windows, features.cache, batch, device=device)
            )
            empty &= {clip.item for clip in featureless(windows)}
            traces.append(list(member.traces(windows)))
        for item in sorted(empty):
            features.add_failure(item)
        whole = ensemble_traces(run, traces, weights)
        visual = dict.fromkeys(s.name for m in members.values() for s in m.record.streams if s.kind == VISUAL)
        for trace in whole:
            if trace.clip.item not in empty:
                columns = frame_columns(features.cache, visual, trace.clip.item, trace.clip.time)
                predicted.append(write_clip(features.out, replace(trace, **columns), note))
    return predicted


def write_clip(out: Path, trace: Trace, note: str = "") -> Predicted:
    """Write `out/<item>.csv` and `out/<item>.png`, with `note` on it, and return the clip's summary."""
    csv, png = (below(out, f"{trace.clip.item}.{suffix}") for suffix in ("csv", "png"))
    write_file(csv, prediction_csv(trace))
    plots.plot_trace(png, trace, note)
    return summarize(trace, csv, png)


def summarize(trace: Trace, csv: Path, png: Path) -> Predicted:
    """Mean, spread, regions and missing input of one clip."""
    shares = np.bincount(trace.region, minlength=len(REGION_NAMES)) / max(1, len(trace.va))
    interval = median_interval(trace.clip.time)

    def missing(mask: Bools | None) -> float | None:
        return None if mask is None else float((~mask).sum() * interval)

    def share(mask: Bools | None) -> float | None:
        return None if mask is None or not len(mask) else float(mask.mean())

    return Predicted(
        trace.clip.item,
        csv,
        png,
        len(trace.va),
        means=dict(zip(DIMENSIONS, trace.va.mean(axis=0).tolist(), strict=True)),
        spreads=dict(zip(DIMENSIONS, trace.va.std(axis=0).tolist(), strict=True)),
        regions=dict(zip(REGION_NAMES, shares.tolist(), strict=True)),
        without_face=missing(trace.face),
        without_audio=missing(trace.audio),
        stds={} if trace.std is None else dict(zip(DIMENSIONS, trace.std.mean(axis=0).tolist(), strict=True)),
        far=share(trace.far),
        interpolated=share(trace.interpolated),
    )
