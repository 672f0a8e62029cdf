"""What `vaflow extract` can be asked for, checked once.

What a file may ask of us. Headers can claim anything; what exceeds these is refused before memory goes into it.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.errors import MediaError, UsageError, explain
from vaflow.timeline import Floats, Grid

MAX_SECONDS = 24 * 3600.0  # of one clip
MAX_GAP = 600.0  # seconds between two frames: grid, windows and sound of the hole between them would be made
MAX_PACKETS = 20_000_000  # of one file: more than a day of 120 frames and 100 blocks of sound a second
MAX_CHANNELS = 64
SOUND_RATES = (1000, 768_000)  # samples per second; beyond them a header is wrong
WORKER_MEMORY = 4 * 2**30  # bytes that a decoding process may take


def check_span(path: Path, times: Floats) -> None:
    """Whether frame times [N] seconds, ascending, N >= 1, are those of a recording that can be.

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
        remedy = "Its times are damaged; copy it again, or write it anew (ffmpeg -fflags +genpts -i OLD -c copy NEW)"
        raise MediaError(explain(f"{path} {problem}", expected=expected, got=got, remedy=remedy))


def limit_memory(limit: int = WORKER_MEMORY) -> None:
    """Have this process refused memory beyond `limit` bytes: an error in the file that asked, not a full machine.

    Where the system knows no such limit, or has a lower one, nothing changes.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def too_much_memory() -> str:
    """What is said of a clip whose reading was refused memory."""
    return explain(
        "Reading the clip takes more memory than a decoding process may have",
        expected=f"at most {WORKER_MEMORY / 2**30:g} GiB",
        remedy="The file is damaged, or far larger than others; leave it out, or cut it into parts",
    )


FACE_SOURCES = ("auto", "centerface", "none")
DTYPES = ("float16", "float32")
ENGINES = ("local", "ray")
DECODERS = ("pyav", "nvdec")
DETECTORS = ("opencv", "torch")
AUTO = -1  # a batch size found out from free memory


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction; all but the last group are part of the streams' fingerprints.

    Attributes:
        visual, audio: encoder names; empty for none. Log-Mel is always kept.
        weights: encoder name -> local file or folder, instead of the hub.
        window, stride: seconds; frames, audio_steps: samples per window.
        dtype: of stored embeddings.
        face_source: one of `FACE_SOURCES`.
        pixels: keep the face crops, for fine-tuning.
        decoder: of pictures: "pyav", on the CPU; "nvdec", on the GPU through torchcodec.
        detector: what runs the network that finds faces: "opencv", in the decoding processes; "torch", on the encoders'
            device.
        prompts: TOML file of the prompt set, or None for the built-in one.
        device: "auto", "cpu" or "cuda[:N]".
        precision: of the encoders' arithmetic: "auto" (float32), "bfloat16", or "float16" on CUDA.
        compile: have torch compile the encoders' networks; results can differ in their last bits.
        image_batch, window_batch: fixed batch sizes; 0 chooses by device, `AUTO` by a GPU's free memory.
        workers: processes that decode; 0 chooses by machine.
        item_timeout: seconds without a sign of life after which a decoding process is ended and its clip has failed;
            0: however long it takes.

    Raises:
        UsageError: a value is not one of the choices, or not positive.
    """

    visual: tuple[str, ...] = ("clip-vit-b16",)
    audio: tuple[str, ...] = ("ast",)
    weights: dict[str, Path] = field(default_factory=dict)
    window: float = 10.0
    stride: float = 3.0
    frames: int = 20
    audio_steps: int = 20
    dtype: str = "float16"
    face_source: str = "auto"
    pixels: bool = False
    decoder: str = "pyav"
    detector: str = "opencv"
    prompts: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    image_batch: int = 0
    window_batch: int = 0
    workers: int = 0
    item_timeout: float = 300.0

    def __post_init__(self) -> None:
        _choose("dtype", self.dtype, DTYPES)
        _choose("faces", self.face_source, FACE_SOURCES)
        _choose("decoder", self.decoder, DECODERS)
        _choose("detector", self.detector, DETECTORS)
        for name, least in (("image_batch", AUTO), ("window_batch", AUTO), ("workers", 0)):
            if getattr(self, name) < least:
                raise UsageError(explain(f"{name} must not be negative", expected="0 or more", got=getattr(self, name)))
        if not 0 <= self.item_timeout < float("inf"):
            raise UsageError(explain("item-timeout is no time", expected="seconds, or 0", got=self.item_timeout))
        if self.audio_steps < 1:
            raise UsageError(explain("audio-steps must be positive", expected="1 or more", got=self.audio_steps))
        unused = [name for name in self.weights if name not in self.visual + self.audio]
        if unused:
            raise UsageError(
                explain("Weights were given for an encoder that is not used", got=unused[0], choices=self.encoders)
            )
        _ = self.grid  # raises on a bad window, stride or frames

    @property
    def grid(self) -> Grid:
        """The sampling grid."""
        return Grid(self.window, self.stride, self.frames)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Every encoder named, visual ones first."""
        return self.visual + self.audio

    @property
    def sampling(self) -> dict[str, float | int]:
        """The part of every stream's identity that says where samples lie."""
        return {
            "window": self.window,
            "stride": self.stride,
            "frames": self.frames,
            "audio_steps": self.audio_steps,
        }


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1: `--shard I/N`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N".

        Raises:
            UsageError: it is not two whole numbers with 1 <= I <= N.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UsageError(explain("--shard is not a part of a whole", expected="I/N with 1 <= I <= N, as 2/8", got=text))

    @property
    def suffix(self) -> str:
        """What file names of this shard carry; empty for the whole."""
        return f"-{self.index}-of-{self.count}" if self.count > 1 else ""


def batch_size(option: str, text: str) -> int:
    """Read "auto" or a number of rows.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return AUTO
    if text.isascii() and text.isdigit():
        return int(text)
    raise UsageError(explain(f"{option} is no batch size", expected="a number, or auto; 0 chooses by device", got=text))


def default_workers(device: str) -> int:
    """Decoding processes: on a CPU encoder they share its cores; a GPU wants every core for decoding."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // 2) if device == "cpu" else max(1, cores - 1)


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(explain(f"Unknown value for {name}", got=value, choices=choices))
