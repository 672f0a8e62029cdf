"""Prediction of valence and arousal for every frame of new videos, or of a cache's clips.

New videos are extracted into a cache first; the two stages meet here and in `vaflow.demo` only.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.datasets.files import below
from vaflow.datasets.videos import has_predictions
from vaflow.device import choose_device
from vaflow.encoders import demonstration_notice, warn_of_demonstration
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import CorruptError, DataError, FingerprintError, UsageError, examples, explain
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.failures import FAILURES, Failure, FailureLog
from vaflow.files import write_file
from vaflow.item_names import clip_and_person
from vaflow.predict_settings import PredictConfig, clips_of, extraction_settings, items_of
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train import plots
from vaflow.train.batch import VISUAL
from vaflow.train.data import load_windows
from vaflow.train.ensemble import ensemble_traces, maker_of, members_of, warn_of_changed_members
from vaflow.train.evaluate import read_for
from vaflow.train.masks import frame_columns
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.prediction_files import (
    prediction_csv,
    read_sources,
    warn_of_earlier_predictions,
    with_earlier_predictions,
    write_sources,
)
from vaflow.train.run_folder import LoadedRun, RunFolder, load_run, local_run
from vaflow.train.scores import featureless
from vaflow.train.traces import Trace

log = logging.getLogger(__name__)

CLIPS_AT_A_TIME = 32
_LONGEST_HEADER = 4096  # bytes of a table's first line
FEATURES = ".features-"  # in the output directory while videos are extracted; then the digest of the settings


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
        """Delete the features of new videos that no --cache keeps."""
        for features in self.temporary:
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
            runs of an ensemble cannot share one extraction.
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
    features = ClipFeatures.of(clips_of(media), settings, out, config, show_progress)
    predicted = write_clips(run, members, weights, features, show_progress)
    sources = {clip.id: clip.audio for clip in features.clips if clip.audio is not None}
    videos = {item: sources[source] for item in features.items if (source := clip_and_person(item)[0]) in sources}
    videos |= {item: sources[item] for item in features.items if item in sources}
    write_sources(out, maker_of(run), features.cache, [clip.item for clip in predicted], videos)
    return features.summary(predicted, config)


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
        """Make `out`, and open the cache of the features; with `settings`, extract those of `clips` first.

        Without `config.cache`, they are in a hidden folder in `out`, one per settings, which an interrupted prediction
        leaves for the next call.

        Raises:
            UsageError: `out` belongs to a cache or a run or holds label tables, whose files would mix with the
                predictions; or there are no clips to predict.
        """
        kind = "a cache" if is_cache(out) else "a run directory" if RunFolder(out).config_file.exists() else ""
        if kind:
            raise UsageError(explain(f"{out} is {kind}", expected="another directory for the predictions"))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(explain(f"Cannot write to {out}", expected="a folder", got=error.strerror)) from error
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
        """Return the counts of the prediction; deletes the features that nothing keeps."""
        temporary = () if config.cache is not None else tuple(self.out.glob(f"{FEATURES}*"))
        failures = tuple(self.failures.failures)
        warn_of_earlier_predictions(self.out, failures)
        summary = PredictSummary(tuple(predicted), failures, self.failures.path, self.cache.path, temporary)
        if not config.keep_features:
            summary.discard()
        return summary


def refuse_foreign_tables(out: Path, items: Iterable[str]) -> None:
    """Check that predictions replace predictions only, not label tables beside the videos.

    Raises:
        UsageError: `out` holds other tables of these names.
    """
    try:
        earlier = read_sources(out)
    except CorruptError:
        earlier = None
    known = set() if earlier is None else set(earlier.items)
    foreign = []
    for item in items:
        try:
            path = below(out, f"{item}.csv")
        except DataError:  # the clip fails when it is written
            continue
        if item not in known and path.is_file():
            with path.open("rb") as file:
                header = file.readline(_LONGEST_HEADER).decode("ascii", "replace").strip().split(",")
            if not has_predictions(header):
                foreign.append(path.name)
    if foreign:
        problem = f"{out} holds tables that predictions would replace"
        expected = "a directory without label tables of these names"
        raise UsageError(explain(problem, expected=expected, got=examples(foreign), remedy="Choose another --out"))


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
