"""Clips whose frames carry their number as black and white blocks, and a reader of that number from a screenshot."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS, SIDE = 12, 32
WIDTH, HEIGHT = BITS * SIDE, 160


def write_clip(
    path: Path, times: Sequence[float], *, codec: str = "libx264", format: str | None = None, audio: bool = True
) -> None:
    """Write a clip with one frame per time (seconds), and a 440 Hz tone in every other second."""
    with av.open(str(path), "w", format=format) as out:
        constant = codec != "libx264"
        video: Any = out.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if not constant:
            video.codec_context.time_base = Fraction(1, 90_000)
            video.options = {"g": "12", "crf": "18"}
        else:
            video.bit_rate = 2_000_000
        audio_stream: Any = (
            out.add_stream("aac" if codec == "libx264" else "mp2", rate=48_000, layout="mono") if audio else None
        )
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_image(number), format="rgb24")
            frame.pts = number if constant else round(time * 90_000)
            frame.time_base = Fraction(1, 25) if constant else Fraction(1, 90_000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio_stream is not None:
            rate, size = 48_000, 1152
            for start in range(0, int(times[-1] * rate), size):
                t = (start + np.arange(size)) / rate
                wave = 0.5 * np.sin(2 * np.pi * 440 * t) * (t.astype(int) % 2 == 0)
                block = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
                block.sample_rate, block.pts, block.time_base = rate, start, Fraction(1, rate)
                out.mux(audio_stream.encode(block))
            out.mux(audio_stream.encode(None))


def numbered_image(number: int) -> NDArray[np.uint8]:
    """[H, W, 3] with the bits of `number`, most significant first, as white blocks on black."""
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(BITS):
        image[:80, bit * SIDE : (bit + 1) * SIDE] = 255 * (number >> (BITS - 1 - bit) & 1)
    return image


def read_number(screenshot: bytes) -> int:
    """The number of the frame that a screenshot of the video element shows."""
    image = np.asarray(Image.open(io.BytesIO(screenshot)).convert("L"), np.float64)
    shown = min(image.shape[1], image.shape[0] * WIDTH / HEIGHT)  # the video is letterboxed
    left, top = (image.shape[1] - shown) / 2, (image.shape[0] - shown * HEIGHT / WIDTH) / 2
    scale = shown / WIDTH
    row = int(top + 40 * scale)
    bits = [image[row, int(left + (bit + 0.5) * SIDE * scale)] > 128 for bit in range(BITS)]
    return int("".join("1" if bit else "0" for bit in bits), 2)


def write_predictions(path: Path, times: Sequence[float], *, labels: bool = True, std: bool = False) -> None:
    """A prediction CSV of slow waves; every tenth second is not labelled."""
    header = ["frame", "time", "valence", "arousal"]
    header += ["label_valence", "label_arousal"] if labels else []
    header += ["valence_std", "arousal_std"] if std else []
    lines = [",".join(header)]
    for k, t in enumerate(times):
        cells = [str(k), f"{t:.6f}", f"{0.8 * np.sin(t / 3):.6f}", f"{0.7 * np.cos(t / 5):.6f}"]
        known = int(t) % 10 != 9
        label = [f"{0.7 * np.sin(t / 3 + 0.3):.6f}", f"{0.6 * np.cos(t / 5):.6f}"]
        cells += (label if known else ["", ""]) * labels
        cells += ["0.2", "0.1"] * std
        lines.append(",".join(cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_clips(root: Path, constant: int, variable: int) -> Path:
    """DIR/media and DIR/predictions of two clips with so many frames: 25 frames/s, and intervals of 20 to 120 ms."""
    (root / "media").mkdir()
    gaps = np.random.default_rng(3).choice([0.02, 0.04, 0.08, 0.12], variable - 1)
    for name, times in (
        ("constant", np.arange(constant) / 25),
        ("variable", np.round(np.concatenate([[0.0], np.cumsum(gaps)]), 4)),
    ):
        write_clip(root / "media" / f"{name}.mp4", times.tolist())
        write_predictions(root / "predictions" / f"{name}.csv", times.tolist(), std=name == "variable")
    return root
