"""Hostile texts, documents and arrays with all their readers: a family is a strategy and a reader.

A reader gets a folder of its own and one example. It must end, or raise an error of ours with one line of message.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fuzz_arrays import NPY, PICKLES, ROWS, TENSORS, TIMES, try_arrays, try_tensors
from fuzz_documents import (
    CHANGED,
    CHANGES,
    LEAF,
    REPLACED,
    RUN_FILES,
    VALUE,
    CacheReader,
    toml_texts,
    try_prompts,
    try_run_file,
    try_run_record,
    try_settings,
    try_tables,
)
from fuzz_tables import TEXT, tables, try_failures, try_features, try_labels, try_lists, try_sample, try_targets
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vaflow.datasets import DIMENSION_READERS, READERS
from vaflow.errors import VaflowError

Reader = Callable[[Path, Any], object]


@dataclass(frozen=True)
class Family:
    """A strategy for examples of one kind and their reader."""

    examples: SearchStrategy[Any]
    read: Reader


def outcome_of(read: Reader, folder: Path, example: Any) -> str:
    """Return "read" or "refused"; raise any other outcome. The directory is emptied."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        read(folder, example)
    except VaflowError as error:
        message = str(error)
        assert message, f"{type(error).__name__} without a message"
        assert len(message.splitlines()) == 1, message
        return "refused"
    finally:
        shutil.rmtree(folder)
    return "read"


def families() -> dict[str, Family]:
    """Every family by name."""
    from importlib import resources

    config = resources.files("vaflow.train").joinpath("presets.toml").read_text("utf-8")
    rows = resources.files("vaflow.train").joinpath("paper_tables.toml").read_text("utf-8")
    prompts = resources.files("vaflow.encoders").joinpath("prompts.toml").read_text("utf-8")
    run_files = st.tuples(st.sampled_from(sorted(RUN_FILES)), CHANGES | st.binary(max_size=60))
    return {
        **{f"labels {name}": Family(TEXT | _label_texts(name), partial(try_labels, name)) for name in FORMATS},
        "lists of names": Family(TEXT | tables("splits") | tables("partition"), try_lists),
        "feature tables": Family(TEXT | tables("features"), try_features),
        "target tables": Family(TEXT | tables("classes"), try_targets),
        "sample submissions": Family(TEXT | tables("sample"), try_sample),
        "lists of failures": Family(TEXT | st.lists(VALUE, max_size=4).map(_lines), try_failures),
        "cache documents": Family(CHANGED | REPLACED, CacheReader()),
        "training settings": Family(toml_texts(SETTINGS + config), try_settings),
        "prompt sets": Family(toml_texts(prompts), try_prompts),
        "ablation tables": Family(toml_texts(rows), try_tables),
        "run settings": Family(toml_texts(RUN), try_run_record),
        "run files": Family(run_files, try_run_file),
        "feature arrays": Family(st.tuples(NPY | ROWS | st.binary(max_size=90), st.none() | TIMES | NPY), try_arrays),
        "weights": Family(TENSORS | PICKLES | st.binary(max_size=90), try_tensors),
    }  # fmt: skip


def _label_texts(name: str) -> SearchStrategy[bytes]:
    if name != "afew-va":
        return tables(name) | tables("times") if name == "csv" else tables(name)
    frame = st.fixed_dictionaries({}, optional={"valence": LEAF | st.integers(-10, 10), "arousal": LEAF})
    number = st.integers(0, 30).map("{:05}".format) | st.sampled_from(("2147483648", "-1", "x", "٣", ""))
    document = st.fixed_dictionaries({"frames": st.dictionaries(number, frame | VALUE, max_size=5) | VALUE}) | VALUE
    return document.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)


def _lines(values: list[Any]) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in [{"item": "a"}, *values])


FORMATS = (*READERS, *DIMENSION_READERS)
SETTINGS = (
    'visual = ["clip-vit-b16"]\naudio = ["none"]\nepochs = 3\nlr = 1e-4\nseed = 0\nwindow = 10.0\nfinetune = false\n'
)
RUN = """vaflow = "0.1.0"
cache = "/data/cache"
[train]
epochs = 3
visual = ["seen"]
[data.train]
clips = 3
[[stream]]
name = "seen"
kind = "visual"
dim = 4
steps = 20
fingerprint = "00"
identity = "{}"
[[target]]
name = "x"
task = "binary"
names = ["a"]
"""
