"""New clips -> per-frame valence and arousal: stage one into a cache, then a trained run on it.

The two stages meet here and in `vaflow.demo` only.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.cache import Cache, open_cache
from vaflow.cache.schema import LOGMEL
from vaflow.datasets import Dataset, open_dataset
from vaflow.datasets.clip import Clip
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.extract.config import DETECTORS, ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.failures import FAILURES, Failure, FailureLog
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.data import load_windows
from vaflow.train.ensemble import combine, maker_of, members_of
from vaflow.train.evaluate import Trace, prediction_csv
from vaflow.train.finetune.backbones import saved_weights
from vaflow.train.inputs import InputStream, check_same, sampling
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.plots import draw_trace
from vaflow.train.provenance import write_sources
from vaflow.train.runs import Run, RunFolder, load_run

log = logging.getLogger(__name__)

IMPORTED = "imported"  # encoder of streams whose features were made elsewhere


@dataclass(frozen=True)
class PredictConfig:
    """How to predict.

    Attributes:
        device: "auto", "cpu" or "cuda[:N]".
        weights: encoder name -> local file or folder, instead of the hub.
        face_source: as for extraction.
        cache: keep the features here and reuse what it holds; None: forget them.
    """

    device: str = "auto"
    weights: Mapping[str, Path] = field(default_factory=dict)
    face_source: str = "auto"
    cache: Path | None = None


@dataclass(frozen=True)
class Predicted:
    """One clip's files: `csv` has a row per video frame, `png` shows both traces; `means` are of the whole clip."""

    item: str
    csv: Path
    png: Path
    frames: int
    means: Mapping[str, float]


@dataclass(frozen=True)
class PredictSummary:
    """What was predicted, and what failed."""

    predicted: tuple[Predicted, ...]
    failures: tuple[Failure, ...]
    failures_file: Path


def predict_media(
    run: Path, media: Sequence[Path], out: Path, config: PredictConfig | None = None, *, show_progress: bool = False
) -> PredictSummary:
    """Predict every frame of videos: `out/<stem>.csv` and `out/<stem>.png` each.

    Args:
        run: folder of a trained run, or of an ensemble; the encoders that it was trained on are run on the videos.
        media: videos, or folders that are searched for videos.
        out: made if it is not there. Clips that fail are listed in `out/failures.jsonl`, and do not stop the others.
        config: how.
        show_progress: bars.

    Raises:
        UsageError: the run or a video is not there, the run was trained on features made elsewhere, or the runs of an
            ensemble cannot share one extraction.
        FingerprintError: the encoders' weights are not those that the run was trained on.
    """
    config = config or PredictConfig()
    device = choose_device(config.device)
    runs, weights = members_of(run)
    members = {path: load_run(path, device) for path in runs}
    settings = _extraction(members, config)
    _warn_of_untrained(members)
    clips = _clips(media)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(explain(f"Cannot write to {out}", expected="a folder", got=error.strerror)) from error
    log = FailureLog(out / FAILURES)
    with _cache_folder(config.cache) as folder:
        summary = extract(Dataset(_root(clips), "videos", clips, ()), folder, settings, show_progress=show_progress)
        for failure in summary.failures:
            log.add(failure, quiet=True)
        failed = {failure.item for failure in summary.failures}
        items = [clip.id for clip in clips if clip.id not in failed]
        cache = open_cache(folder)
        predicted = _predict([members[path] for path in runs], weights, cache, items, out, show_progress)
        videos = {clip.id: clip.video for clip in clips if clip.video is not None}
        write_sources(out, maker_of(run), cache, items, videos)
    return PredictSummary(predicted, tuple(log.failures), log.path)


def _extraction(members: Mapping[Path, Run], config: PredictConfig) -> ExtractConfig:
    """The extraction that makes every stream which a run, or some run of an ensemble, reads."""
    records = [run.record for run in members.values()]
    streams = [stream for record in records for stream in record.wanted]
    imported = [stream.name for stream in streams if stream.identity.get("encoder") == IMPORTED]
    if imported:
        raise UsageError(
            explain(
                f"The run reads features that were made elsewhere ({', '.join(dict.fromkeys(imported))}), so none can "
                "be made here",
                expected="a run on streams that `vaflow extract` makes",
                remedy="Import the new clips' features into a cache, and use `vaflow evaluate RUN --cache CACHE`",
            )
        )
    _check_alike(members)
    own: dict[str, Path] = {}
    for path, run in members.items():
        own |= saved_weights(RunFolder(path).encoders, run.record.tuned)  # of a fine-tuned run
    sampled = [found for stream in streams if (found := sampling(stream.identity))]
    chosen = sampled[0] if sampled else {}
    return ExtractConfig(
        visual=tuple(dict.fromkeys(stream.name for stream in streams if stream.kind == "visual")),
        audio=tuple(dict.fromkeys(stream.name for stream in streams if stream.kind == "audio")),
        weights={**own, **config.weights},
        window=chosen.get("window", 10.0),
        stride=chosen.get("stride", 3.0),
        frames=int(chosen.get("frames", 20)),
        audio_steps=int(chosen.get("audio_steps", 20)),
        face_source=config.face_source,
        device=config.device,
        precision=_precision(streams, config.device),
        detector=next((name for stream in streams if (name := _detector(stream))), ExtractConfig.detector),
    )


def _detector(stream: InputStream) -> str:
    """What ran the network that finds faces, as a setting; "" for streams of sound."""
    runtime = stream.identity.get("picture", {}).get("faces", {}).get("runtime", "")
    return next((name for name in DETECTORS if runtime.startswith(f"{name} ")), "")


def _warn_of_untrained(members: Mapping[Path, Run]) -> None:
    for path, run in members.items():
        for name in run.record.untrained:
            log.warning("%s learned from no label of %s: what it says of it means nothing", path, name)


def _precision(streams: Sequence[InputStream], device: str) -> str:
    """That of the run's cache, if its streams have one in common which the device can do; else float32."""
    found = {stream.identity.get("precision", "auto") for stream in streams if stream.kind != LOGMEL}
    name = found.pop() if len(found) == 1 else "auto"
    return "auto" if name == "float16" and choose_device(device).type != "cuda" else name


def _check_alike(members: Mapping[Path, Run]) -> None:
    """One extraction serves all runs: they want the same encoder behind a name, and the same sampling everywhere."""
    first: dict[str, tuple[object, Path]] = {}
    for path, run in members.items():
        for what, fact in _asked_for(run):
            other, elsewhere = first.setdefault(what, (fact, path))
            if other != fact:
                raise UsageError(
                    explain(
                        f"The runs of this ensemble do not agree in {what}: one extraction cannot serve them all",
                        expected="runs on one cache, or on caches extracted alike",
                        got=f"{elsewhere} and {path}",
                        remedy="Predict with each of the runs, and average their CSV files",
                    )
                )


def _asked_for(run: Run) -> Iterator[tuple[str, object]]:
    """What an extraction must be like, and what that is, to make the streams which a run reads."""
    for stream in run.record.wanted:
        if "weights" in stream.identity:
            yield f"the encoder of {stream.name}", stream.identity["weights"]
        for key, value in sampling(stream.identity).items():
            yield f"the sampling ({key})", value


def _clips(media: Sequence[Path]) -> tuple[Clip, ...]:
    """One clip per video. The id, and so the file name, is the stem; with the extension where two share it."""
    videos: list[Path] = []
    for path in media:
        if path.is_dir():
            videos += [clip.video for clip in open_dataset(path, "videos").clips if clip.video is not None]
        elif path.is_file():
            videos.append(path)
        else:
            raise UsageError(explain("There is no such video", expected="a video or a folder of videos", got=path))
    videos = list(dict.fromkeys(path.absolute() for path in videos))
    stems = Counter(path.stem for path in videos)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in videos]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            explain(
                "Two videos would write the same files",
                expected="videos with names of their own",
                got=twice[0],
                remedy="Predict them in two calls with different --out",
            )
        )
    return tuple(Clip(name, None, name, path, path) for name, path in zip(names, videos, strict=True))


def _root(clips: Sequence[Clip]) -> Path:
    return clips[0].video.parent if clips and clips[0].video is not None else Path()


@contextmanager
def _cache_folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="vaflow-") as folder:
        yield Path(folder) / "cache"


def _predict(
    members: Sequence[Run], weights: Floats, cache: Cache, items: Sequence[str], out: Path, show_progress: bool
) -> tuple[Predicted, ...]:
    """Traces of every run, their weighted mean, and its files; `weights` [N, 2], a row per run."""
    if not items:
        return ()
    said, read = [], []
    for run in members:
        record = run.record
        check_same(record.wanted, cache)
        device = next(run.model.parameters()).device
        read.append(load_windows(cache, items, record.wanted, record.config, device=device, show=show_progress))
        said.append(list(run.traces(read[-1])))
    seen = max(read, key=lambda windows: len({stream.kind for stream in windows.streams}))
    predicted = []
    for trace in combine(said, weights):
        item = trace.clip.item
        csv, png = out / f"{item}.csv", out / f"{item}.png"
        write_file(csv, prediction_csv(trace))
        draw_trace(png, trace, seen)
        predicted.append(Predicted(item, csv, png, len(trace.va), _means(trace)))
    return tuple(predicted)


def _means(trace: Trace) -> dict[str, float]:
    return {name: float(value) for name, value in zip(DIMENSIONS, trace.va.mean(axis=0), strict=True)}
