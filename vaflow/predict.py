"""New clips -> per-frame valence and arousal: stage one into a cache, then a trained run on it.

The two stages meet here and in `vaflow.demo` only.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.datasets.clip import Clip
from vaflow.errors import UsageError, explain
from vaflow.extract.config import ExtractConfig
from vaflow.extract.failures import Failure, FailureLog
from vaflow.extract.pipeline import extract
from vaflow.train.builder import choose_device
from vaflow.train.data import load_windows
from vaflow.train.evaluate import Trace, prediction_csv
from vaflow.train.finetune.backbones import saved_weights
from vaflow.train.inputs import check_same, sampling
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.plots import draw_trace
from vaflow.train.provenance import write_sources
from vaflow.train.runs import Run, RunFolder, load_run
from vaflow.train.storage import write_whole

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
        run: folder of a trained run; the encoders that it was trained on are run on the videos.
        media: videos, or folders that are searched for videos.
        out: made if it is not there. Clips that fail are listed in `out/failures.jsonl`, and do not stop the others.
        config: how.
        show_progress: bars.

    Raises:
        UsageError: the run or a video is not there, or the run was trained on features made elsewhere.
        FingerprintError: the encoders' weights are not those that the run was trained on.
    """
    config = config or PredictConfig()
    device = choose_device(config.device)
    trained = load_run(run, device)
    settings = _extraction(run, trained, config)
    clips = _clips(media)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(explain(f"Cannot write to {out}", expected="a folder", got=error.strerror)) from error
    log = FailureLog(out / "failures.jsonl")
    with _cache_folder(config.cache) as folder:
        summary = extract(Dataset(_root(clips), "videos", clips, ()), folder, settings, show_progress=show_progress)
        for failure in summary.failures:
            log.add(failure, quiet=True)
        failed = {failure.item for failure in summary.failures}
        items = [clip.id for clip in clips if clip.id not in failed]
        cache = open_cache(folder)
        predicted = _predict(trained, cache, items, out, show_progress) if items else ()
        videos = {clip.id: clip.video for clip in clips if clip.video is not None}
        write_sources(out, run, trained.record, cache, items, videos)
    return PredictSummary(predicted, tuple(log.failures), log.path)


def _extraction(path: Path, run: Run, config: PredictConfig) -> ExtractConfig:
    """The extraction that makes the streams which the run reads."""
    record = run.record
    imported = [stream.name for stream in record.streams if stream.identity.get("encoder") == IMPORTED]
    if imported:
        raise UsageError(
            explain(
                f"The run reads features that were made elsewhere ({', '.join(imported)}), so none can be made here",
                expected="a run on streams that `vaflow extract` makes",
                remedy="Import the new clips' features into a cache, and use `vaflow evaluate RUN --cache CACHE`",
            )
        )
    own = saved_weights(RunFolder(path).encoders, record.tuned)  # of a fine-tuned run
    sampled = [found for stream in record.streams if (found := sampling(stream.identity))]
    chosen = sampled[0] if sampled else {}
    return ExtractConfig(
        visual=tuple(stream.name for stream in record.streams if stream.kind == "visual"),
        audio=tuple(stream.name for stream in record.streams if stream.kind == "audio"),
        weights={**own, **config.weights},
        window=chosen.get("window", 10.0),
        stride=chosen.get("stride", 3.0),
        frames=int(chosen.get("frames", 20)),
        audio_steps=int(chosen.get("audio_steps", 20)),
        face_source=config.face_source,
        device=config.device,
    )


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


def _predict(run: Run, cache: Cache, items: Sequence[str], out: Path, show_progress: bool) -> tuple[Predicted, ...]:
    record = run.record
    check_same(record.wanted, cache)
    device = next(run.model.parameters()).device
    windows = load_windows(cache, items, record.wanted, record.config, device=device, show=show_progress)
    predicted = []
    for trace in run.traces(windows):
        item = trace.clip.item
        csv, png = out / f"{item}.csv", out / f"{item}.png"
        write_whole(csv, prediction_csv(trace).encode())
        draw_trace(png, trace, windows)
        predicted.append(Predicted(item, csv, png, len(trace.va), _means(trace)))
    return tuple(predicted)


def _means(trace: Trace) -> dict[str, float]:
    return {name: float(value) for name, value in zip(DIMENSIONS, trace.va.mean(axis=0), strict=True)}
