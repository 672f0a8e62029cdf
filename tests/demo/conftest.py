"""A small demo dataset for all tests, and readers independent of the writer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vaflow.demo.writer import DemoSummary, write_demo

SMALL: dict[str, Any] = {"train": 9, "val": 2, "test": 1, "seconds": 12, "rate": 10, "width": 160, "height": 120}


@dataclass(frozen=True)
class Written:
    root: Path
    summary: DemoSummary

    def labels(self, split_folder: str, trial: str) -> list[tuple[float, float]]:
        """The rows of an annotation file, read as plain text."""
        lines = (self.root / "VA_Estimation_Challenge" / split_folder / f"{trial}.txt").read_text().splitlines()
        rows = [line.split(",") for line in lines[1:]]
        return [(float(valence), float(arousal)) for valence, arousal in rows]

    def videos(self) -> dict[str, Path]:
        """Stem -> file."""
        return {path.stem: path for path in (self.root / "raw_videos").glob("batch*/*")}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Twelve trials with every quirk."""
    root = tmp_path_factory.mktemp("demo") / "data"
    return Written(root, write_demo(root, **SMALL))
