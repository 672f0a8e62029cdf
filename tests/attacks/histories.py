"""Random histories of a tiny data set, its cache and a run, checked against a simple model of what must be true.

The model knows which content each clip has on disk, which content the cache was given, and which content the run was
trained on. After each command one rule is checked: a number that is printed is computed from the data that is in the
cache now, or the command refuses with exit code 2.

Hypothesis replays histories, so which rules can follow must not depend on the moment at which a kill struck:
preconditions read only `clips`, `extracted` and `run_started`; a rule that does not apply after all does nothing.
"""

import json
import shutil
import signal
import time
from collections.abc import Mapping
from typing import ClassVar

from history_model import (
    EXTRACT,
    NAMES,
    SPLITS,
    TRAIN,
    VIDEOS,
    Content,
    Workshop,
    check_cache,
    check_scores,
    holds,
    metrics_of,
    shared_videos,
    streams_of,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from lab import Ended, Process, assert_printed


class Histories(RuleBasedStateMachine):
    """Edits of the data set and commands in any order."""

    workshop: ClassVar[Workshop]

    def __init__(self) -> None:
        super().__init__()
        self.root = self.workshop.new_folder()
        self.data, self.cache, self.run = (self.root / name for name in ("data", "cache", "run"))
        self.clips: dict[str, Content] = {}
        self.cached: dict[str, Content] = {}  # committed by `extract` and not dropped
        self.partial: set[str] = set()  # clips with one stream only, because their extraction was killed
        self.mixed: set[str] = set()  # clips with streams of two contents, for the same reason
        self.trained_on: dict[str, Content] | None = None  # by the run (finished or interrupted)
        self.next_labels = 0
        self.extracted = self.run_started = False

    @property
    def finished(self) -> bool:
        """Whether the run has scores."""
        return (self.run / "metrics.json").is_file()

    def teardown(self) -> None:
        """Remove the history's folder."""
        shutil.rmtree(self.root)

    # Edits of the data set

    @initialize(commands=st.integers(0, 2))
    def start(self, commands: int) -> None:
        """Create three clips (two train, one val); extraction and training are optional."""
        for name, split, video in (("a", "train", 0), ("b", "train", 1), ("c", "val", 2)):
            self.put(name, video, split)
        for command in (self.extract, self.train)[:commands]:
            command()

    def put(self, name: str, video: int, split: str) -> None:
        """Write a clip with new labels."""
        shutil.copyfile(self.workshop.videos[video], self.data / f"{name}.mp4")
        self.write_labels(name, video, split)

    def write_labels(self, name: str, video: int, split: str) -> None:
        """Write new labels of a clip, and the list of splits."""
        self.next_labels += 1
        self.clips[name] = content = Content(video, self.next_labels, split)
        rows = [f"{k},{v},{a}" for k, (v, a) in enumerate(content.label_values())]
        (self.data / f"{name}.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
        self.write_splits()

    def write_splits(self) -> None:
        """Write the list of splits."""
        rows = [f"{name},{content.split}" for name, content in self.clips.items()]
        (self.data / "splits.csv").write_text("\n".join(["name,split", *rows]) + "\n")

    @rule(data=st.data())
    def edit_labels(self, data: st.DataObject) -> None:
        """New labels for one clip."""
        name = data.draw(st.sampled_from(sorted(self.clips)))
        self.write_labels(name, self.clips[name].video, self.clips[name].split)

    @rule(data=st.data(), video=st.integers(0, VIDEOS - 1))
    def replace_video(self, data: st.DataObject, video: int) -> None:
        """Another video, with labels of its own, under the same name."""
        name = data.draw(st.sampled_from(sorted(self.clips)))
        self.put(name, video, self.clips[name].split)

    @rule(data=st.data(), video=st.integers(0, VIDEOS - 1), split=st.sampled_from(SPLITS))
    @precondition(lambda self: len(self.clips) < len(NAMES))
    def add(self, data: st.DataObject, video: int, split: str) -> None:
        """A clip under a new name, or under the name of one that was deleted."""
        self.put(data.draw(st.sampled_from(sorted(set(NAMES) - set(self.clips)))), video, split)

    @rule(data=st.data(), split=st.sampled_from(SPLITS))
    @precondition(lambda self: len(self.clips) < len(NAMES))
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
        """Extract; the cache equals the dataset, and removed clips are listed."""
        self.extracted = True
        ended = self.workshop.run("extract", self.data, "--out", self.cache, *EXTRACT)
        assert_printed(ended, 0)
        absent = sorted((set(self.cached) | self.mixed | self.partial) - set(self.clips))
        for name in absent:
            assert repr(name) in ended.err or f" {name}" in ended.err, f"{name} is not named: {ended.err}"
        if absent:
            assert "cache drop" in ended.err, ended.err
        self.cached.update(self.clips)
        self.mixed -= set(self.clips)
        self.partial -= set(self.clips)
        self.check_cache()

    @rule(seconds=st.floats(0.05, 0.8))
    def kill_extract(self, seconds: float) -> None:
        """Kill an extraction at some moment: each clip is as before, as the data set has it, or incomplete."""
        process = self.workshop.start("extract", self.data, "--out", self.cache, *EXTRACT)
        kill_after(process, seconds)
        if not (self.cache / "manifest.json").is_file():
            return
        streams = streams_of(self.cache)
        for name, content in self.clips.items():
            held = [known for known in (content, self.cached.pop(name, None)) if known]
            held = [known for known in held if holds(self.cache, name, known)]
            self.partial.discard(name)
            self.mixed.discard(name)
            if held:
                self.cached[name] = held[0]
            elif number := sum(name in items for items in streams.values()):
                (self.partial if number == 1 else self.mixed).add(name)

    @rule()
    @precondition(lambda self: self.extracted)
    def drop_absent(self) -> None:
        """`cache drop --absent` removes what the data set no longer has, and nothing else.

        A data set that has no clip of the cache is rejected: it is more likely another data set than one without clips.
        """
        known = set(self.cached) | self.mixed | self.partial
        if not known - set(self.clips):
            return
        ended = self.workshop.run("cache", "drop", self.cache, "--absent", self.data)
        if not known & set(self.clips):
            assert_printed(ended, 2)
            self.check_cache()
            return
        assert_printed(ended, 0)
        self.cached = {name: content for name, content in self.cached.items() if name in self.clips}
        self.mixed &= set(self.clips)
        self.partial &= set(self.clips)
        self.check_cache()

    @rule()
    @precondition(lambda self: self.extracted)
    def train(self) -> None:
        """Train or resume; changed data are rejected."""
        self.run_started = True
        before = {path.name: path.read_bytes() for path in self.run.glob("m*.*")} if self.finished else {}
        self.after_train(self.workshop.run("train", self.cache, "--out", self.run, *TRAIN), before)

    @rule(seconds=st.floats(0.05, 0.8))
    @precondition(lambda self: self.extracted)
    def kill_train(self, seconds: float) -> None:
        """Kill a training run at some moment."""
        self.run_started = True
        if self.mixed | self.partial:
            return
        kill_after(self.workshop.start("train", self.cache, "--out", self.run, *TRAIN), seconds)
        if self.trained_on is None and (self.run / "checkpoint.safetensors").is_file():
            self.trained_on = dict(self.cached)

    @rule()
    @precondition(lambda self: self.run_started)
    def remove_run(self) -> None:
        """Remove the run."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.trained_on, self.run_started = None, False

    @rule(split=st.sampled_from(SPLITS))
    @precondition(lambda self: self.run_started)
    def evaluate(self, split: str) -> None:
        """The printed CCC is that of the run's predictions and the labels in the cache now."""
        if not self.finished:
            return
        ended = self.workshop.run("evaluate", self.run, "--split", split, "--json", "--device", "cpu")
        if ended.code:
            assert ended.code in (1, 2), ended.err
            return
        assert not self.mixed, f"a score was printed although {self.mixed} mix two contents"
        check_scores(json.loads(ended.out), self.run, split, self.cached)

    # What must hold

    def check_cache(self) -> None:
        """Compare the cache with the model, except incomplete clips."""
        if not self.mixed | self.partial:
            check_cache(self.cache, self.cached, self.clips)

    def after_train(self, ended: Ended, before: Mapping[str, bytes]) -> None:
        """A finished run was trained on the current cache; a rejected command leaves the run unchanged."""
        if ended.code == 0:
            assert not self.mixed, f"trained although {self.mixed} mix two contents"
            assert not shared_videos(self.cached), "a video in both splits was not reported"
            assert self.trained_on in (None, self.cached), f"trained on {self.trained_on}, not {self.cached}"
            self.trained_on = dict(self.cached)
            check_scores(metrics_of(self.run), self.run, "val", self.cached)
            return
        assert ended.code == 2, ended.err
        both_splits = {content.split for content in self.cached.values()} == set(SPLITS)
        if not self.mixed | self.partial and self.trained_on not in (None, self.cached) and both_splits:
            assert "--fresh" in ended.err or shared_videos(self.cached), ended.err
        if before:
            after = {path.name: path.read_bytes() for path in self.run.glob("m*.*")}
            assert after == before, "a rejected command changed the run"


def kill_after(process: Process, seconds: float) -> None:
    """Kill a command after some time, unless it has ended, and wait for its end and that of its workers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.running():
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    process.wait()
    assert not process.orphans(), "worker processes of a killed command are still running"


def machine(workshop: Workshop) -> type[RuleBasedStateMachine]:
    """The state machine class whose histories run in `workshop`."""
    return type("WorkshopHistories", (Histories,), {"workshop": workshop})
