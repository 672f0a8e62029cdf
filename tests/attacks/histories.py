"""Random histories of a tiny data set, its cache and a run, checked against a simple model of what must be true.

The model knows which content each clip has on disk, which content the cache was given, and which content the run was
trained on. After each command one rule is checked: a number that is printed is computed from the data that is in the
cache now, or the command refuses with exit code 2.
"""

import json
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from lab import Ended, Lab, assert_said
from media import write_media

from vaflow.cache import open_cache

VIDEOS = 5  # distinct contents, encoded once
SAMPLING = ["--window", "2", "--stride", "1", "--frames", "4", "--audio-steps", "4"]
EXTRACT = ["--visual", "none", "--audio", "logmel", "--device", "cpu", "--workers", "1", *SAMPLING]
TRAIN = ["--visual", "none", "--audio", "logmel", "--kl-weight", "0", "--set", "hidden=8", "--device", "cpu"]
EPOCHS = ["--epochs", "3", "--batch-size", "4"]
SPLITS = ("train", "val")
NAMES = tuple("abcdef")


@dataclass(frozen=True)
class Content:
    """What a clip is made of: the number of its video, the seed of its labels, its split."""

    video: int
    labels: int
    split: str


Contents = Mapping[str, Content]


class Workshop:
    """What all histories of one session share: a process that forks commands, and videos that are encoded once."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.videos = [write_media(folder / "videos", VIDEOS) / f"clip{k}.mp4" for k in range(VIDEOS)]
        self.frames = [40 + 5 * k for k in range(VIDEOS)]
        self._count = 0

    def new_folder(self) -> Path:
        """An empty folder for one history."""
        self._count += 1
        folder = self.folder / f"history{self._count}"
        (folder / "data").mkdir(parents=True)
        return folder


def label_values(content: Content, frames: int) -> np.ndarray:
    """[frames, 2] valence and arousal, as they are written to the table: four digits."""
    rng = np.random.default_rng([content.labels, content.video])
    walk = np.cumsum(rng.normal(0, 0.08, (frames, 2)), axis=0)
    return np.round(np.clip(walk, -1, 1), 4)


def concordance(prediction: np.ndarray, label: np.ndarray) -> float:
    """CCC with population variances, restated."""
    covariance = np.mean((prediction - prediction.mean()) * (label - label.mean()))
    return float(2 * covariance / (prediction.var() + label.var() + (prediction.mean() - label.mean()) ** 2))


def machine(workshop: Workshop) -> type[RuleBasedStateMachine]:
    """The state machine class whose histories run in `workshop`."""

    class Histories(RuleBasedStateMachine):
        """Edits of the data set and commands in any order."""

        def __init__(self) -> None:
            super().__init__()
            self.root = workshop.new_folder()
            self.data, self.cache, self.run = (self.root / name for name in ("data", "cache", "run"))
            self.clips: dict[str, Content] = {}
            self.cached: dict[str, Content] = {}  # what `extract` has put into the cache, and nothing has dropped
            self.trained_on: dict[str, Content] | None = None  # by the run, finished or not
            self.finished = False
            self.next_labels = 0

        def teardown(self) -> None:
            """Remove the history's folder."""
            shutil.rmtree(self.root)

        def vaflow(self, *args: object) -> Ended:
            """Run a command to its end; a traceback or an unknown exit code is a failure of the history."""
            ended = workshop.lab.run(args)
            assert "Traceback" not in ended.err, ended.err[-3000:]
            assert ended.code in (0, 1, 2, 3), f"exit code {ended.code}: {ended.err[-2000:]}"
            return ended

        # Edits of the data set

        @initialize()
        def start(self) -> None:
            """Three clips: two to train, one to validate."""
            for name, split, video in (("a", "train", 0), ("b", "train", 1), ("c", "val", 2)):
                self.put(name, video, split)

        def put(self, name: str, video: int, split: str) -> None:
            """Write a clip with new labels."""
            self.next_labels += 1
            self.clips[name] = Content(video, self.next_labels, split)
            shutil.copyfile(workshop.videos[video], self.data / f"{name}.mp4")
            self.write_tables(name)

        def write_tables(self, name: str) -> None:
            """Write the labels of a clip and the list of splits."""
            content = self.clips[name]
            rows = [f"{k},{v},{a}" for k, (v, a) in enumerate(label_values(content, workshop.frames[content.video]))]
            (self.data / f"{name}.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
            self.write_splits()

        def write_splits(self) -> None:
            """Write the list of splits."""
            rows = [f"{name},{content.split}" for name, content in self.clips.items()]
            (self.data / "splits.csv").write_text("\n".join(["name,split", *rows]) + "\n")

        @rule(data=st.data())
        @precondition(lambda self: self.clips)
        def edit_labels(self, data: st.DataObject) -> None:
            """New labels for one clip."""
            name = data.draw(st.sampled_from(sorted(self.clips)))
            content = self.clips[name]
            self.next_labels += 1
            self.clips[name] = Content(content.video, self.next_labels, content.split)
            self.write_tables(name)

        @rule(data=st.data(), video=st.integers(0, VIDEOS - 1))
        @precondition(lambda self: self.clips)
        def replace_video(self, data: st.DataObject, video: int) -> None:
            """Another video, with labels of its own, under the same name."""
            name = data.draw(st.sampled_from(sorted(self.clips)))
            self.put(name, video, self.clips[name].split)

        @rule(data=st.data(), split=st.sampled_from(SPLITS))
        @precondition(lambda self: self.clips and len(self.clips) < len(NAMES))
        def rename(self, data: st.DataObject, split: str) -> None:
            """The same files under another name, perhaps in another split."""
            old = data.draw(st.sampled_from(sorted(self.clips)))
            new = data.draw(st.sampled_from(sorted(set(NAMES) - set(self.clips))))
            content = self.clips.pop(old)
            for suffix in (".mp4", ".csv"):
                (self.data / f"{old}{suffix}").rename(self.data / f"{new}{suffix}")
            self.clips[new] = Content(content.video, content.labels, split)
            self.write_splits()

        @rule(data=st.data())
        @precondition(lambda self: len(self.clips) > 2)
        def delete(self, data: st.DataObject) -> None:
            """Remove a clip from the data set."""
            name = data.draw(st.sampled_from(sorted(self.clips)))
            del self.clips[name]
            for suffix in (".mp4", ".csv"):
                (self.data / f"{name}{suffix}").unlink()
            self.write_splits()

        # Commands

        @rule()
        def extract(self) -> None:
            """Afterwards the cache holds what the data set holds; what the data set no longer has is named."""
            ended = self.vaflow("extract", self.data, "--out", self.cache, *EXTRACT)
            assert_said(ended, 0)
            absent = sorted(set(self.cached) - set(self.clips))
            for name in absent:
                assert repr(name) in ended.err or f" {name}" in ended.err, f"{name} is not named: {ended.err}"
            if absent:
                assert "cache drop" in ended.err, ended.err
            self.cached.update(self.clips)
            self.check_cache()

        @rule()
        @precondition(lambda self: bool(set(self.cached) - set(self.clips)))
        def drop_absent(self) -> None:
            """`cache drop --absent` removes what the data set no longer has, and nothing else."""
            assert_said(self.vaflow("cache", "drop", self.cache, "--absent", self.data), 0)
            self.cached = {name: content for name, content in self.cached.items() if name in self.clips}
            self.check_cache()

        @rule()
        @precondition(lambda self: self.cached)
        def train(self) -> None:
            """Train, resume, or say that the run is done; other data than before is refused."""
            before = {path.name: path.read_bytes() for path in self.run.glob("m*.*")} if self.run.is_dir() else {}
            ended = self.vaflow("train", self.cache, "--out", self.run, *TRAIN, *EPOCHS)
            self.after_train(ended, before)

        @rule(seconds=st.floats(0.05, 1.0))
        @precondition(lambda self: self.cached)
        def kill_train(self, seconds: float) -> None:
            """Kill a training run at some moment."""
            process = workshop.lab.start(
                ["train", self.cache, "--out", self.run, *TRAIN, "--epochs", "3", "--batch-size", "1"]
            )
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and process.running():
                time.sleep(0.01)
            process.send(signal.SIGKILL)
            process.wait()
            if self.trained_on is None and (self.run / "checkpoint.safetensors").is_file():
                self.trained_on = dict(self.cached)

        @rule()
        @precondition(lambda self: self.run.is_dir())
        def start_afresh(self) -> None:
            """Remove the run."""
            shutil.rmtree(self.run)
            self.trained_on, self.finished = None, False

        @rule(split=st.sampled_from(SPLITS))
        @precondition(lambda self: self.finished)
        def evaluate(self, split: str) -> None:
            """The printed CCC is that of the run's predictions and the labels in the cache now."""
            ended = self.vaflow("evaluate", self.run, "--split", split, "--json", "--device", "cpu")
            if ended.code:
                assert ended.code in (1, 2), ended.err
                return
            self.check_scores(json.loads(ended.out), split)

        # What must hold

        def check_cache(self) -> None:
            """Labels and splits in the cache are those of the model."""
            cache = open_cache(self.cache)
            assert set(cache.items(stream="labels")) == set(self.cached)
            for name, content in self.cached.items():
                labels = cache.read("labels", name)
                expected = label_values(content, workshop.frames[content.video])
                np.testing.assert_allclose(labels.value, expected, atol=1e-6, err_msg=name)
                if name in self.clips:
                    assert name in cache.items(split=content.split)

        def after_train(self, ended: Ended, before: Mapping[str, bytes]) -> None:
            """A run that ends well was trained on what the cache holds now."""
            shared = {content.video for content in self.cached.values() if content.split == "train"} & {
                content.video for content in self.cached.values() if content.split == "val"
            }
            splits = {content.split for content in self.cached.values()}
            if ended.code == 0:
                assert not shared, "one video stands in train and in val, and nothing was said"
                assert self.trained_on in (None, self.cached), f"trained on {self.trained_on}, not {self.cached}"
                self.trained_on, self.finished = dict(self.cached), True
                self.check_scores(json.loads((self.run / "metrics.json").read_text()), "val")
                return
            assert ended.code == 2, ended.err
            if self.trained_on not in (None, self.cached) and splits == set(SPLITS) and not shared:
                assert "--fresh" in ended.err, ended.err
            if self.finished:
                after = {path.name: path.read_bytes() for path in self.run.glob("m*.*")}
                assert after == before, "a refused command changed the run"

        def check_scores(self, scores: Mapping[str, object], split: str) -> None:
            """Scores equal those of the prediction files against the labels that the cache should hold."""
            prediction, label = [], []
            for name, content in sorted(self.cached.items()):
                if content.split != split:
                    continue
                frames = workshop.frames[content.video]
                rows = np.genfromtxt(
                    self.run / "predictions" / split / f"{name}.csv", delimiter=",", names=True, usecols=range(4)
                )
                assert len(rows) == frames, f"{name}: {len(rows)} rows for {frames} frames"
                prediction.append(np.stack([rows["valence"], rows["arousal"]], axis=1))
                label.append(label_values(content, frames))
            assert label, "a score was printed for a split without clips"
            predicted, labelled = np.concatenate(prediction), np.concatenate(label)
            assert scores["n_frames"] == len(labelled)
            for k, dimension in enumerate(("valence", "arousal")):
                expected = concordance(predicted[:, k], labelled[:, k])
                printed = scores["ccc"][dimension]  # type: ignore[index]
                assert abs(expected - printed) < 1e-3, f"{split} {dimension}: printed {printed}, in truth {expected}"

    return Histories
