"""A small demo dataset for all tests, and readers independent of the writer."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vaflow.demo import write_demo
from vaflow.demo.scenario import DemoClip, DemoConfig, demo_clips

SMALL: dict[str, Any] = {"train": 9, "val": 2, "test": 1, "seconds": 12, "rate": 10, "width": 160, "height": 120}


@dataclass(frozen=True)
class Written:
    root: Path
    clips: list[DemoClip]

    def labels(self, split_folder: str, trial: str) -> list[tuple[float, float]]:
        """The rows of an annotation file, read as plain text."""
        lines = (self.root / "VA_Estimation_Challenge" / split_folder / f"{trial}.txt").read_text().splitlines()
        rows = [line.split(",") for line in lines[1:]]
        return [(float(valence), float(arousal)) for valence, arousal in rows]

    def quirks(self) -> Counter[str]:
        """Irregularity -> number of trials that are planned with it."""
        quirks = Counter(clip.quirk for clip in self.clips if clip.quirk)
        labelled = [clip for clip in self.clips if clip.split != "test"]
        quirks["rows-unlike-frames"] = sum(clip.rows != len(clip.times) for clip in labelled)
        quirks["unannotated-run"] = sum(not clip.annotated().all() for clip in labelled)
        quirks["missing-crops"] = sum(not clip.cropped.all() for clip in self.clips)
        return quirks

    def videos(self) -> dict[str, Path]:
        """Stem -> file."""
        return {path.stem: path for path in (self.root / "raw_videos").glob("batch*/*")}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Twelve trials with every quirk."""
    root = tmp_path_factory.mktemp("demo") / "data"
    assert write_demo(root, **SMALL)
    return Written(root, demo_clips(DemoConfig(**SMALL)))
