"""Settings of an extraction, and the limits that protect it from damaged or malicious files.

A header can claim anything; files that exceed these limits are refused before memory is allocated for them.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vaflow import settings
from vaflow.errors import MediaError, UsageError, explain
from vaflow.settings import setting

if TYPE_CHECKING:
    from vaflow.timeline import Floats, Grid

MAX_SECONDS = 24 * 3600.0  # duration of a clip
MAX_GAP = 600.0  # seconds between two frames; longer gaps would be filled with samples and windows
MAX_PACKETS = 20_000_000  # of a file: more than a day of 120 frames and 100 audio packets a second
MAX_CHANNELS = 64
MAX_SAMPLES = 100_000  # per window
AUDIO_RATES = (1000, 768_000)  # samples per second; headers outside this range are wrong
WORKER_MEMORY = 4 * 2**30  # bytes that a decoding process may allocate

FACE_SOURCES = ("auto", "centerface", "none")
DTYPES = ("float16", "float32")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DECODERS = ("pyav", "nvdec")
DETECTORS = ("opencv", "torch")
AUTO = -1  # a batch size measured from free memory
P1 = "arXiv 2603.13415, section 3"


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction; each field carries its description (see `vaflow.settings`).

    All but the last group are part of the streams' fingerprints. Log-Mel is always kept.

    Raises:
        UsageError: a value is not one of the choices, out of range, or does not go with another.
    """

    # fmt: off
    visual: tuple[str, ...] = setting(("clip-vit-b16",), "Visual encoders, or none",
        group="encoders", option="--visual", shown=True)
    audio: tuple[str, ...] = setting(("ast",), "Audio encoders, or none",
        group="encoders", option="--audio", shown=True)
    weights: dict[str, Path] = field(default_factory=dict)
    window: float = setting(10.0, "Length of a window",
        group="sampling", unit="seconds", at_least=0.1, below=MAX_SECONDS, source=P1, option="--window", shown=True)
    stride: float = setting(3.0, "Time between the starts of two windows",
        group="sampling", unit="seconds", at_least=0.01, below=MAX_SECONDS, source=P1, option="--stride", shown=True)
    frames: int = setting(20, "Frames per window",
        group="sampling", at_least=1, below=MAX_SAMPLES, source=P1, option="--frames", shown=True)
    audio_steps: int = setting(20, "Audio steps per window",
        group="sampling", at_least=1, below=MAX_SAMPLES, option="--audio-steps")
    dtype: str = setting("float16", "Type of the stored embeddings",
        group="output", choices=DTYPES, option="--dtype", metavar="TYPE")
    face_source: str = setting("auto",
        "Source of the faces; auto takes the dataset's crops, or detects; none takes whole frames",
        group="faces", choices=FACE_SOURCES, option="--faces", shown=True)
    pixels: bool = setting(False, "Keep the face crops (JPEG) for fine-tuning",
        group="faces", option="--pixels", shown=True)
    person: str = setting("main",
        "Person to estimate: main (most seconds of clear face), all, left, right, id:K, speaking, or largest face",
        group="faces", pattern=r"main|all|left|right|speaking|largest|id:[1-9]\d*",
        form="main, all, left, right, id:K, speaking or largest", option="--person", metavar="WHO")
    chosen_only: bool = setting(False, "Store no crops of other people; choosing one of them later needs the videos",
        group="faces", option="--chosen-only")
    identity: str = setting("auto",
        "Network that joins tracks to people: dlib, onnx:FILE or none; auto is dlib if it is installed",
        group="faces", pattern=r"auto|none|dlib|onnx:.+", form="auto, none, dlib or onnx:FILE", option="--identity",
        metavar="NAME")
    decoder: str = setting("pyav",
        "Video decoder; nvdec decodes on the GPU through torchcodec (experimental: never run on a GPU)",
        group="decoding", choices=DECODERS, option="--decoder")
    detector: str = setting("opencv",
        "Runtime of the face detector; torch runs on the encoders' device (experimental: never run on a GPU)",
        group="faces", choices=DETECTORS, option="--detector")
    prompts: Path | None = setting(None, "TOML file of prompt templates and descriptions",
        group="encoders", unset="the built-in prompt set", option="--prompts")
    device: str = setting("auto", "Device of the encoders",
        group="hardware", pattern=r"auto|cpu|cuda(:\d+)?", form="auto, cpu or cuda[:N]", option="--device", shown=True,
        metavar="DEVICE")
    precision: str = setting("auto", "Precision of the encoders; auto is float32, float16 requires CUDA",
        group="hardware", choices=PRECISIONS, option="--precision")
    compile: bool = setting(False,
        "Compile the encoders with torch: slow start, then faster (experimental: never run on a GPU)",
        group="hardware", option="--compile")
    image_batch: int = setting(0,
        "Images per batch; auto fits the GPU's free memory (experimental: never run on a GPU)",
        group="hardware", at_least=0, unset="by device", words={"auto": AUTO}, option="--image-batch")
    window_batch: int = setting(0, "Audio windows per batch, as --image-batch",
        group="hardware", at_least=0, unset="by device", words={"auto": AUTO}, option="--window-batch")
    workers: int = setting(0, "Decoding processes (with ray: per actor)",
        group="hardware", at_least=0, unset="by number of CPU cores", option="--workers", shown=True)
    item_timeout: float = setting(300.0, "Skip a clip if its decoder stalls for this long (0 = no limit)",
        group="decoding", unit="seconds", at_least=0, option="--item-timeout")
    # fmt: on

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", {name: Path(path) for name, path in self.weights.items()})
        if isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", Path(self.prompts))
        settings.check(self)
        unused = [name for name in self.weights if name not in self.encoders]
        if unused:
            problem = "--weights names an encoder that is not used"
            raise UsageError(explain(problem, got=unused[0], choices=self.encoders))
        if self.person == "all" and (self.face_source == "none" or not (self.visual or self.pixels)):
            problem = "--person all requires faces"
            raise UsageError(explain(problem, expected="a visual encoder or --pixels, and not --faces none"))
        _ = self.grid  # raises if the stride is longer than the window

    @property
    def grid(self) -> "Grid":
        """The sampling grid."""
        from vaflow.timeline import Grid

        return Grid(self.window, self.stride, self.frames)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of all encoders, visual ones first."""
        return self.visual + self.audio

    @property
    def sampling(self) -> dict[str, float | int]:
        """The part of every stream's identity that gives the places of its samples."""
        return {"window": self.window, "stride": self.stride, "frames": self.frames, "audio_steps": self.audio_steps}


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`, counted from 1: `--shard I/N`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N".

        Raises:
            UsageError: it is not two integers with 1 <= I <= N.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UsageError(explain("--shard must be I/N with 1 <= I <= N, such as 2/8", got=text))

    @property
    def suffix(self) -> str:
        """Suffix of the shard's file names; empty if there is one shard."""
        return f"-{self.index}-of-{self.count}" if self.count > 1 else ""


def check_span(path: Path, times: "Floats") -> None:
    """Check that frame times [N] in seconds, ascending, N >= 1, are plausible for a recording.

    Raises:
        MediaError: the last one is before 0 or later than `MAX_SECONDS`, or there is a hole longer than `MAX_GAP`.
    """
    gap = float((times[1:] - times[:-1]).max()) if times.size > 1 else 0.0
    problem = None
    if times[-1] < 0:
        problem, expected, got = "ends before it begins", "frames at 0 s or later", f"the last one at {times[-1]:.2f} s"
    elif times[-1] > MAX_SECONDS:
        problem, expected, got = "claims to be too long", f"at most {MAX_SECONDS / 3600:g} h", f"{times[-1] / 3600:g} h"
    elif gap > MAX_GAP:
        problem, expected, got = "has a hole", f"a frame every {MAX_GAP:g} s at least", f"none for {gap:g} s"
    if problem is not None:
        remedy = "Its times are damaged; copy it again, or write them anew: ffmpeg -fflags +genpts -i OLD -c copy NEW"
        raise MediaError(explain(f"{path} {problem}", expected=expected, got=got, remedy=remedy))


def limit_memory() -> None:
    """Limit the memory of this process to `WORKER_MEMORY`, so that a file that needs more raises an error.

    Nothing changes where the system has no such limit, or a lower one is set.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > WORKER_MEMORY:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (WORKER_MEMORY, hard))


def too_much_memory() -> str:
    """Error message of a clip that needs more memory than `WORKER_MEMORY`."""
    problem = "Reading the clip takes more memory than a decoding process may allocate"
    remedy = "The file is damaged, or far larger than others: remove it, or cut it into pieces"
    return explain(problem, expected=f"at most {WORKER_MEMORY / 2**30:g} GiB", remedy=remedy)


def default_workers(device: str) -> int:
    """Number of decoding processes: half of the CPU cores beside an encoder on the CPU, else all but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // 2) if device == "cpu" else max(1, cores - 1)
