"""Model of the random histories: clip contents, commands, expected scores and caches."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab import Ended, Lab, Process
from media import write_media

from vaflow.cache import open_cache

VIDEOS = 5  # distinct contents; video k has 40 + 5 k frames
SPLITS = ("train", "val")
NAMES = tuple("abcdef")
SAMPLING = ["--window", "2", "--stride", "1", "--frames", "4", "--audio-steps", "4"]
EXTRACT = ["--visual", "none", "--audio", "logmel", "--faces", "none", "--device", "cpu", "--workers", "1", *SAMPLING]
TRAIN = ["--visual", "none", "--audio", "logmel", "--kl-weight", "0", "--set", "hidden=8", "--device", "cpu"]
TRAIN += ["--epochs", "4", "--batch-size", "2"]

# Decoding processes are forked from the command instead of starting Python again, and a finished run draws no plots:
# both cost most of the time of a command on five clips of two seconds, and no number depends on them.
CHEAP_COMMANDS = """
import multiprocessing, vaflow.train.plots
fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method=None: fork
vaflow.train.plots.draw_run = lambda *arguments, **settings: None
"""


@dataclass(frozen=True)
class Content:
    """Content of a clip: video number, label seed, split."""

    video: int
    labels: int
    split: str

    @property
    def frames(self) -> int:
        """Frames of the video."""
        return 40 + 5 * self.video

    def label_values(self) -> np.ndarray:
        """[frames, 2] valence and arousal, rounded to four digits as in the table."""
        rng = np.random.default_rng([self.labels, self.video])
        walk = np.cumsum(rng.normal(0, 0.08, (self.frames, 2)), axis=0)
        return np.round(np.clip(walk, -1, 1), 4)


class Workshop:
    """Shared state of all histories of one session: the forking process and the videos."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.videos = [write_media(folder / "videos", VIDEOS) / f"clip{k}.mp4" for k in range(VIDEOS)]
        self._count = 0

    def new_folder(self) -> Path:
        """An empty folder for one history."""
        self._count += 1
        folder = self.folder / f"history{self._count}"
        (folder / "data").mkdir(parents=True)
        return folder

    def start(self, *args: object) -> Process:
        """Start a command."""
        return self.lab.start(args, CHEAP_COMMANDS)

    def run(self, *args: object) -> Ended:
        """Run a command; a traceback or an unexpected exit code fails the history."""
        ended = self.start(*args).wait()
        assert "Traceback" not in ended.err, ended.err[-3000:]
        assert ended.code in (0, 1, 2, 3), f"exit code {ended.code}: {ended.err[-2000:]}"
        return ended


def concordance(prediction: np.ndarray, label: np.ndarray) -> float:
    """CCC with population variances, restated."""
    covariance = np.mean((prediction - prediction.mean()) * (label - label.mean()))
    return float(2 * covariance / (prediction.var() + label.var() + (prediction.mean() - label.mean()) ** 2))


def holds(cache_path: Path, name: str, content: Content) -> bool:
    """Whether the cache has the labels of `content` and the audio of its video for a clip, both complete."""
    if not all(name in streams_of(cache_path).get(stream, ()) for stream in ("labels", "logmel")):
        return False
    cache = open_cache(cache_path)
    labels, expected = cache.read("labels", name).value, content.label_values()
    rows = len(cache.read("logmel", name).time)  # 100 a second
    return (
        labels.shape == expected.shape
        and bool(np.allclose(labels, expected, atol=1e-6))
        and abs(rows - (150 + 25 * content.video)) < 10
    )


def streams_of(cache_path: Path) -> dict[str, set[str]]:
    """Stream -> the clips that it has."""
    cache = open_cache(cache_path)
    return {stream: set(cache.items(stream=stream)) for stream in cache.streams()}


def check_cache(cache_path: Path, cached: Mapping[str, Content], clips: Mapping[str, Content]) -> None:
    """Assert that clips, labels, audio and splits of the cache equal the model."""
    cache = open_cache(cache_path)
    assert set(cache.items(stream="labels")) == set(cached)
    for name, content in cached.items():
        assert holds(cache_path, name, content), f"{name} is not {content}"
        if name in clips:
            assert name in cache.items(split=content.split)


def check_scores(scores: Mapping[str, Any], run: Path, split: str, cached: Mapping[str, Content]) -> None:
    """Assert that scores equal those computed from the prediction files and the cached labels."""
    prediction, label = [], []
    for name, content in sorted(cached.items()):
        if content.split == split:
            rows = np.genfromtxt(
                run / "predictions" / split / f"{name}.csv", delimiter=",", names=True, usecols=range(4)
            )
            assert len(rows) == content.frames, f"{name}: {len(rows)} rows for {content.frames} frames"
            prediction.append(np.stack([rows["valence"], rows["arousal"]], axis=1))
            label.append(content.label_values())
    assert label, "a score was printed for a split without clips"
    predicted, labelled = np.concatenate(prediction), np.concatenate(label)
    assert scores["n_frames"] == len(labelled)
    for k, dimension in enumerate(("valence", "arousal")):
        expected, printed = concordance(predicted[:, k], labelled[:, k]), scores["ccc"][dimension]
        assert abs(expected - printed) < 1e-3, f"{split} {dimension}: printed {printed}, expected {expected}"


def metrics_of(run: Path) -> dict[str, Any]:
    """The scores that a finished run stores."""
    scores: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return scores


def shared_videos(cached: Mapping[str, Content]) -> set[int]:
    """Videos that occur in both splits."""
    train, val = ({content.video for content in cached.values() if content.split == split} for split in SPLITS)
    return train & val
