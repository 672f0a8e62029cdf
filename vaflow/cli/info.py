"""`vaflow info`: versions, devices, optional extras and folders."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from vaflow.cli.common import Output, echo, heading, loading, print_json

PACKAGES = ("torch", "torchvision", "torchaudio", "transformers", "open_clip_torch", "av", "zarr", "h5py", "numpy")
EXTRAS = {"s3": "s3fs", "ray": "ray", "nvdec": "torchcodec", "docs": "mkdocs-material", "dev": "pytest"}
VARIABLES = ("VAFLOW_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")


def info(output: Output) -> int:
    """Print versions, devices, optional extras and cache folders. Add the output to a bug report.

    Example: vaflow info

    Example: vaflow info --json
    """
    with loading(output):
        facts = collect()
    if output.json:
        print_json(facts)
        return 0
    for title, values in facts.items():
        if not values:
            continue
        echo(heading(title))
        for name, value in values.items():
            echo(f"  {name}: {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Section -> name -> value, all of them strings, numbers or None."""
    import av
    import torch

    from vaflow import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    return {
        "Versions": {
            "vaflow": __version__,
            "Python": platform.python_version(),
            "system": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
            "FFmpeg in av": ", ".join(f"{k} {v[0]}.{v[1]}" for k, v in sorted(av.library_versions.items())),
            "CUDA in torch": str(torch.version.cuda),
        },
        "Devices": {
            "CPU cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "GPUs": ", ".join(gpus) or "none",
            "--device auto": "cuda" if gpus else "cpu",
        },
        "Extras": {name: _version(package) for name, package in EXTRAS.items()},
        "Programs": {name: shutil.which(name) or "not found" for name in ("ffmpeg", "g++")},
        "Folders": {
            "installed in": str(Path(__file__).parents[1]),
            "copies of remote caches": os.environ.get("VAFLOW_CACHE_DIR") or "temporary (VAFLOW_CACHE_DIR is not set)",
            "Hugging Face weights": str(hub),
            "torch weights": str(torch_home),
        },
        "Environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
