"""Cost of tracking everyone: extraction with --person main against --person largest, tiny encoders.

Usage: python scripts/bench_people.py VIDEOS [--repeat 3]
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from vaflow.datasets import open_dataset
from vaflow.encoders import build_encoder
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with


def main() -> None:
    """Print the CPU and wall seconds of both, least of the repetitions, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset, visual, audio = open_dataset(args.videos, "videos"), build_encoder("clip-tiny"), build_encoder("ast-tiny")
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repeat):
        for name, person, identity in (
            ("largest", "largest", "none"),
            ("main, no network", "main", "none"),
            ("main, dlib", "main", "auto"),
        ):
            folder = Path(tempfile.mkdtemp())
            options = {"visual": ("clip-tiny",), "audio": ("ast-tiny",), "device": "cpu", "workers": 1}
            config = ExtractConfig(**options, person=person, identity=identity)  # type: ignore[arg-type]
            began = time.perf_counter()
            extract_with(dataset, folder / "cache", config, [visual], [audio], torch.device("cpu"))  # type: ignore[list-item]
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            shutil.rmtree(folder)
    base = min(seconds["largest"])
    for name, times in seconds.items():
        print(f"{name:18} {min(times):6.1f} s  {100 * (min(times) / base - 1):+.0f} %")


if __name__ == "__main__":
    main()
