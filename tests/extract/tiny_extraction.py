"""Extraction with the tiny encoders in this process, and comparison of what it wrote."""

from dataclasses import replace
from pathlib import Path

import torch

from vaflow.cache import Cache
from vaflow.datasets import Dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with
from vaflow.extract.plan import Summary

CPU = torch.device("cpu")
CONFIG = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), device="cpu", workers=2)
WHOLE = replace(CONFIG, face_source="none")  # whole frames: nothing is detected
STREAMS = ["labels", "logmel", "clip-tiny", "ast-tiny"]


def run(dataset: Dataset, out: Path, pair: tuple, config: ExtractConfig = CONFIG, **options: object) -> Summary:
    """Extract with a visual and an audio encoder; None leaves one out."""
    visual, audio = [[encoder] if encoder is not None else [] for encoder in pair]
    return extract_with(dataset, out, config, visual, audio, CPU, **options)  # type: ignore[arg-type]


def assert_same_arrays(one: Cache, other: Cache, streams: list[str]) -> None:
    """Assert that both have the same items and the same bits in these streams."""
    assert one.items() == other.items()
    for stream in streams:
        for item in one.items(stream=stream):
            a, b = one.read(stream, item).arrays, other.read(stream, item).arrays
            assert a.keys() == b.keys()
            for name in a:
                assert a[name].tobytes() == b[name].tobytes(), (stream, item, name)
                assert a[name].dtype == b[name].dtype
