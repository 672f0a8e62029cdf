"""The functions of `import vaflow`: load a run, predict, extract, train, open a cache.

Heavy modules are imported when a function is called. Paths may be `str` or `pathlib.Path`.
"""

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaflow.errors import DataError, UsageError, command, explain

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from vaflow.cache import Cache
    from vaflow.extract.plan import Summary

PathLike = str | Path

__all__ = ["Run", "Table", "extract", "load", "open_cache", "train"]


class Table(dict[str, "NDArray[Any]"]):
    """Columns of equal length: column name -> array [rows].

    A prediction has one row per video frame and the columns `frame` (from 0), `time` (seconds), `valence` and
    `arousal` (in [-1, 1]); further columns may follow.
    """

    def to_pandas(self) -> "pandas.DataFrame":
        """The same columns as a `pandas.DataFrame`.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            remedy = "From a clone: pip install -e '.[pandas]'"
            raise UsageError(explain("to_pandas requires pandas", got=error, remedy=remedy)) from error
        return pandas.DataFrame(dict(self))

    @classmethod
    def read_csv(cls, path: PathLike) -> "Table":
        """Columns of a prediction file, as written by `vaflow predict`.

        Columns of integers and of numbers have these types, an empty cell is NaN; all others are text.
        """
        import numpy as np

        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file))
        table = cls()
        for name, cells in zip(header, zip(*rows, strict=True), strict=True):
            try:
                numbers = np.array([float(cell) if cell else np.nan for cell in cells])
            except ValueError:
                table[name] = np.array(cells)
                continue
            whole = all(cell.lstrip("-").isdigit() for cell in cells)
            table[name] = numbers.astype(np.int64) if whole else numbers
        return table


class Run:
    """A trained run, or an ensemble of runs.

    Attributes:
        path: its directory.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"vaflow.load({str(self.path)!r})"

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of the run's `metrics.json`: scores on the validation split."""
        return dict(json.loads((self.path / "metrics.json").read_text("utf-8")))

    def predict(
        self,
        video: PathLike,
        *,
        device: str = "auto",
        weights: Mapping[str, PathLike] | None = None,
        show_progress: bool = False,
    ) -> Table:
        """Valence and arousal of every frame of a video.

        Args:
            video: a video file.
            device: "auto", "cpu" or "cuda[:N]".
            weights: encoder name -> local file or folder, instead of a download.
            show_progress: draw progress bars.

        Raises:
            UsageError: the run or the video does not exist, or the run cannot be used on videos.
            DataError: the video cannot be read.
            WeightsError: weights of an encoder are missing.
        """
        from vaflow.predict import PredictConfig, predict_media

        if Path(video).is_dir():
            remedy = command("predict", self.path, video, "--out", "DIR")
            raise UsageError(explain(f"{video} is a folder", expected="one video file", remedy=remedy))
        config = PredictConfig(device=device, weights={k: Path(v) for k, v in (weights or {}).items()})
        with tempfile.TemporaryDirectory(prefix="vaflow-") as folder:
            summary = predict_media(self.path, [Path(video)], Path(folder), config, show_progress=show_progress)
            if summary.failures:
                raise DataError(explain(f"Cannot predict {video}", got=summary.failures[0].message))
            return Table.read_csv(summary.predicted[0].csv)

    def evaluate(
        self, split: str | None = None, *, cache: PathLike | None = None, device: str = "auto"
    ) -> dict[str, Any]:
        """Score the run on a labelled split, as `vaflow evaluate` does.

        Args:
            split: None: the run's validation split.
            cache: another cache than the run was trained on.
            device: "auto", "cpu" or "cuda[:N]".

        Raises:
            UsageError: the run, cache or split does not exist, or the split has no labels.
        """
        from vaflow.train.evaluate import evaluate_run
        from vaflow.train.run_folder import cache_of

        opened = open_cache(cache if cache is not None else cache_of(self.path))
        return evaluate_run(self.path, opened, split, device=device)


def load(run: PathLike) -> Run:
    """Open the directory of a finished run, of an exported run or of an ensemble, or `hf:USER/NAME` of the hub.

    Raises:
        UsageError: the directory holds none of them, or the run is not finished.
        WeightsError: the hub cannot be reached, or has no such model.
    """
    from vaflow.train.ensemble import members_of
    from vaflow.train.run_folder import RunFolder, local_run, require_record

    run = local_run(run)
    members, _ = members_of(run)
    for member in members:
        require_record(member)
        if not RunFolder(member).done:
            raise UsageError(explain(f"{member} is not finished", remedy="Run `vaflow train` again to resume it"))
    return Run(run)


def open_cache(path: PathLike) -> "Cache":
    """Open a feature cache for reading.

    Args:
        path: a directory, or a URL such as s3://bucket/name.cache.

    Raises:
        UsageError: `path` holds no cache.
        SchemaError: the cache has a format that this version does not read.
    """
    from vaflow.cache import open_cache

    return open_cache(path)


def extract(
    root: PathLike,
    out: PathLike,
    *,
    visual: Sequence[str] = ("clip-vit-b16",),
    audio: Sequence[str] = ("ast",),
    layout: str = "auto",
    store: str = "zarr",
    show_progress: bool = False,
    **settings: Any,
) -> "Summary":
    """Encode a data set into a cache; call it again to resume. Clips that fail are listed in the summary.

    Args:
        root: directory of the data set.
        out: directory or URL of the cache.
        visual: names of visual encoders; empty for none.
        audio: names of audio encoders; empty for none.
        layout: layout of the data set; "auto" detects it.
        store: "zarr" or "hdf5", for a new cache.
        show_progress: draw progress bars.
        settings: further fields of `vaflow.extract.config.ExtractConfig`, such as `window=10.0` or `pixels=True`.

    Raises:
        UsageError: a name, path or setting is wrong.
        FingerprintError: a stream in the cache was made with other settings.
        WeightsError: weights are missing or do not fit.
    """
    from vaflow.datasets import open_dataset
    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.pipeline import extract as run
    from vaflow.settings import settings_of

    known = list(ExtractConfig.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise UsageError(explain("Unknown setting of extract", got=name, choices=known))
    weights = {name: Path(path) for name, path in (settings.pop("weights", None) or {}).items()}
    # window=10 becomes 10.0, as on the command line: fingerprints tell them apart
    described = settings_of(ExtractConfig)
    given = {"visual": visual, "audio": audio, **settings}
    config = ExtractConfig(weights=weights, **{name: described[name].coerce(value) for name, value in given.items()})
    target = out if "://" in str(out) else Path(out)
    return run(open_dataset(root, layout), target, config, store=store, show_progress=show_progress)  # type: ignore[arg-type]


def train(
    cache: "PathLike | Cache",
    out: PathLike,
    *,
    preset: str | None = None,
    config: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    allow_missing: bool = False,
    show_progress: bool = False,
    **settings: Any,
) -> Run:
    """Train a model on a cache; call it again to resume. Returns the finished run.

    Args:
        cache: directory, URL or open cache.
        out: directory of the run.
        preset: settings of a published system, "p1" or "p2".
        config: TOML file of settings; overrides the preset.
        weights: for fine-tuning, encoder name -> local weights.
        allow_missing: score the validation split even if labelled clips have no features.
        show_progress: draw progress bars.
        settings: fields of `vaflow.train.config.TrainConfig`, such as `epochs=20`; they override preset and config.
            Paths among them may be `pathlib.Path`.

    Raises:
        UsageError: a setting is wrong, or `out` holds another run.
        DataError: features or labels are unusable; the message names the clips.
    """
    from vaflow.cache import Cache
    from vaflow.train import config as configs
    from vaflow.train.train_run import train_run

    merged = configs.merge(
        configs.preset(preset) if preset else {},
        configs.read_settings(Path(config)) if config is not None else {},
        {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
    )
    train_run(
        cache if isinstance(cache, Cache) else open_cache(cache),
        merged,
        Path(out),
        weights={name: Path(path) for name, path in (weights or {}).items()},
        allow_missing=allow_missing,
        show=show_progress,
    )
    return Run(out)
