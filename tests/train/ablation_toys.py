"""A small grid on the synthetic cache, and untrained runs with generated predictions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from synthetic_cache import AUDIO, VISUAL

from vaflow.train.ablate.pool import RUNS
from vaflow.train.ablate.tables import Entry, Row, Schedule, ScheduledRun, Study, Table, load_study
from vaflow.train.ablate.workers import write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.metrics import concordance_of_moments, mean_over_dimensions, video_moments

GRID = f"""
[base]
visual = ["{VISUAL}"]
audio = ["{AUDIO}"]
hidden = 8
epochs = 1

[table.one]
title = "First"

[[table.one.row]]
name = "full"
paper = {{ valence = 0.1, arousal = 0.2, mean = 0.15 }}

[[table.one.row]]
name = "gated"
fusion = "gated"

[table.two]

[[table.two.row]]
name = "gated again"
fusion = "gated"

[[table.two.row]]
name = "eyes"
audio = ["none"]
"""


def grid_file(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def toy_study(folder: Path, text: str = GRID) -> Study:
    return load_study(grid_file(folder, text))


def made_up_schedule(
    out: Path, tables: Mapping[str, Sequence[Row]], noise: Mapping[str, float], *, videos: int = 30, seeds: int = 2
) -> Schedule:
    """A schedule whose runs lie in `out`, finished: each row's predictions are labels plus noise of its deviation.

    A row without noise has no run. Rows of one name are one configuration. The full model has noise["full"].
    """
    rng = np.random.default_rng(0)
    labels = [rng.uniform(-1, 1, size=(60, 2)) for _ in range(videos)]
    errors = [[rng.normal(size=y.shape) for y in labels] for _ in range(seeds)]
    runs: dict[str, ScheduledRun] = {}
    for name, deviation in noise.items():
        for seed in range(seeds):
            seed_noise = [rng.normal(scale=0.02, size=y.shape) for y in labels]
            pairs = zip(labels, errors[seed], seed_noise, strict=True)
            write_run(out, key_of(name, seed), [(y + deviation * (e + o), y) for y, e, o in pairs])
            runs[key_of(name, seed)] = ScheduledRun(key_of(name, seed), TrainConfig(seed=seed), name)
    entries = {
        table: tuple(Entry(row, TrainConfig(), keys(row.name, noise, seeds)) for row in rows)
        for table, rows in tables.items()
    }
    planned = tuple((Table(name, "", tuple(rows)), entries[name]) for name, rows in tables.items())
    reference = Entry(Row("", "full model"), TrainConfig(), keys("full", noise, seeds))
    return Schedule(planned, reference, tuple(runs.values()))


def key_of(name: str, seed: int) -> str:
    return f"{crc32(name.encode()):08x}-{seed}"


def keys(name: str, noise: Mapping[str, float], seeds: int) -> tuple[str, ...]:
    return tuple(key_of(name, seed) for seed in range(seeds)) if name in noise else ()


def write_run(out: Path, key: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """The files from which tables are computed."""
    folder = out / RUNS / key
    folder.mkdir(parents=True)
    moments = {f"v{i}": video_moments(x, y) for i, (x, y) in enumerate(pairs)}
    write_moments(folder, moments)
    ccc = concordance_of_moments(np.sum(list(moments.values()), axis=0))
    scores = dict(zip(("valence", "arousal", "mean"), [*ccc, mean_over_dimensions(ccc)], strict=True))
    metrics = {
        "split": "val",
        "n_frames": sum(len(y) for _, y in pairs),
        "ccc": {name: float(value) for name, value in scores.items()},
        "within_video_ccc": {"mean": 0.5},
        "missing": {"clips": []},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
