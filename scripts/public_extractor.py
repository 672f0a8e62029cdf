"""Benchmark of `vaflow extract` against clip-video-encode (PyPI), which writes CLIP embeddings of frames.

It pins old versions and therefore requires a separate environment; `bench_extract.py --public` takes its interpreter:

    python -m venv --system-site-packages cve
    cve/bin/pip install --no-deps clip-video-encode video2numpy webdataset fire pyarrow pandas youtube-dl

Both run as commands, with the same network and weights, on whole frames, about two of them per second; loading the
network is part of both. vaflow also reads the sound and writes log-Mel, the other does not.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vaflow.cache import open_cache
from vaflow.errors import VaflowError

MODEL = "ViT-B-32"  # the other's default
RATE = 2  # frames per second, as in vaflow's default grid

CALL = """
import sys
from clip_video_encode import clip_video_encode
videos, out, nth, model, weights, workers = sys.argv[1:]
clip_video_encode(
    videos.split(";"), out, take_every_nth=int(nth), frame_workers=int(workers), frame_memory_size=1,
    oc_model_name=model, pretrained=weights,
)
"""


def versus(python: Path, clips: list[Path], frame_rate: int, folder: Path) -> tuple[float, float]:
    """Images per second of vaflow and of clip-video-encode.

    Raises:
        VaflowError: one of the commands failed.
    """
    weights = _weights(folder)
    return _ours(clips[0].parent, weights, folder), _theirs(python, clips, frame_rate, weights, folder)


def _weights(folder: Path) -> Path:
    import open_clip
    import torch

    path = folder / "random.pt"
    torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), path)
    return path


def _ours(data: Path, weights: Path, folder: Path) -> float:
    name, cache = f"clip:{MODEL}/{weights}", folder / "versus.cache"
    command = [sys.executable, "-m", "vaflow", "extract", str(data), "--out", str(cache), "--faces", "none", "--quiet"]
    seconds = _seconds([*command, "--visual", name, "--audio", "none"])
    written = open_cache(cache)
    return sum(int(written.read(name, item).valid.sum()) for item in written.items()) / seconds


def _theirs(python: Path, clips: list[Path], frame_rate: int, weights: Path, folder: Path) -> float:
    out = folder / "theirs"
    out.mkdir()
    arguments = [";".join(map(str, clips)), str(out), str(frame_rate // RATE), MODEL, str(weights)]
    seconds = _seconds([str(python), "-c", CALL, *arguments, str(max(1, (os.cpu_count() or 1) // 2))])
    written = list(out.glob("*.npy"))
    if len(written) != len(clips):
        raise VaflowError(f"clip-video-encode wrote {len(written)} of {len(clips)} clips")
    return sum(len(np.load(path)) for path in written) / seconds


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VaflowError(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began
