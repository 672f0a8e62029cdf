"""Peak memory of an extraction against the length of its clip: `bench_extract.py --memory 1 30 120 600`.

Clips of any length are made in seconds: one minute is encoded (64 x 64 pixels, 5 frames a second) and its packets are
repeated. The encoders cost nothing and are as wide as the default ones, so that all arrays have their full size.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SIDE, RATE, AUDIO_RATE = 64, 5, 16_000
MINUTE = 60
AUDIO_FRAME = 1024  # samples of an AAC packet


def write_minute(path: Path) -> None:
    """A minute of a gliding pattern and a gliding tone, H.264 without B-frames and AAC."""
    import av

    cells = np.random.default_rng(0).integers(0, 255, (SIDE // 16, SIDE // 16, 3), np.uint8)
    image = cells.repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": "50", "bf": "0", "crf": "35"}
        video = container.add_stream("libx264", rate=RATE, options=options)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=AUDIO_RATE, bit_rate=24_000)
        for k in range(MINUTE * RATE):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.roll(image, 3 * k, axis=1), format="rgb24")))
        container.mux(video.encode())
        at = np.arange(MINUTE * AUDIO_RATE) / AUDIO_RATE
        tone = (0.3 * np.sin(2 * np.pi * (200 * at + 5 * at**2))).astype(np.float32)
        block = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        block.sample_rate = AUDIO_RATE
        container.mux(audio.encode(block))
        container.mux(audio.encode())


def repeat(minute: Path, path: Path, times: int) -> None:
    """The packets of a minute, again and again."""
    import av

    with av.open(str(minute)) as source, av.open(str(path), "w") as container:
        streams = [source.streams.video[0], source.streams.audio[0]]
        copies = [container.add_stream_from_template(stream) for stream in streams]
        packets = [packet for packet in source.demux(*streams) if packet.size]
        audio_packets = sum(packet.stream_index == 1 for packet in packets)
        lengths = [Fraction(MINUTE), Fraction(audio_packets * AUDIO_FRAME, AUDIO_RATE)]
        for number in range(times):
            for packet in packets:
                shift = round(number * lengths[packet.stream_index] / packet.time_base)
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = (packet.pts or 0) + shift, (packet.dts or 0) + shift
                copy.duration = packet.duration
                copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
                copy.stream = copies[packet.stream_index]
                container.mux(copy)


def measure_memory(folder: Path, lengths: list[int]) -> list[tuple[str, str, str]]:
    """Peak memory of the main and the decoding process for clips of so many minutes, each in a run of its own."""
    write_minute(folder / "minute.mp4")
    rows, first = [], 0.0
    for minutes in lengths:
        data = folder / f"minutes{minutes}"
        data.mkdir()
        repeat(folder / "minute.mp4", data / "clip.mp4", minutes)
        command = [sys.executable, __file__, os.fspath(data), os.fspath(folder / f"cache{minutes}")]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        peak = json.loads(answer)
        both = peak["main"] + peak["worker"]
        first = first or both
        note = f"{both - first:+.0f} with the worker's {peak['worker']:.0f}; {peak['seconds']:.0f} s"
        rows.append((f"peak memory, {minutes} min, MB", f"{peak['main']:.0f}", note))
    return rows


def extract_one(root: Path, out: Path) -> dict[str, float]:
    """Extract everything, crops too; MB of each process at its largest."""
    import torch

    from vaflow.datasets import open_dataset
    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.pipeline import extract_with

    visual, audio = free_encoders()
    config = ExtractConfig(
        visual=(visual.name,), audio=(audio.name,), device="cpu", workers=1, face_source="none", pixels=True
    )
    began, over = time.perf_counter(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(_watch_workers, over)
        summary = extract_with(open_dataset(root, "videos"), out, config, [visual], [audio], torch.device("cpu"))
        over.set()
    if summary.failures:
        raise SystemExit(f"extraction failed: {summary.failures[0].message}")
    return {
        "main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "worker": worker.result(),
        "seconds": time.perf_counter() - began,
    }


def _watch_workers(over: threading.Event) -> float:
    """Peak memory of the decoding process in MB, from the system's last value before it ended.

    What the system adds up for children that have ended counts what they were forked from, too.
    """
    largest: dict[int | None, int] = {}
    while not over.wait(0.02):
        for process in multiprocessing.active_children():
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:  # it has ended meanwhile
                continue
            largest |= [(process.pid, int(line.split()[1])) for line in lines if line.startswith("VmHWM")]
    return max(largest.values(), default=0) / 1024


def free_encoders() -> tuple[Any, Any]:
    """Encoders that take the inputs of CLIP ViT-B/16 and AST and give vectors as wide as theirs, made of pixels."""
    import torch

    from vaflow.encoders import build_encoder
    from vaflow.encoders.base import KALDI

    clip: Any = build_encoder("clip-tiny")
    ast: Any = build_encoder("ast-tiny")

    class Visual:
        kind, name, dim, identity = "visual", "free-visual", 512, {"encoder": "none"}
        image_size, preparation, module = clip.image_size, clip.preparation, clip.module
        prepare = clip.prepare

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, ::7, ::7, 0].reshape(len(images), -1)[:, : self.dim].float() / 255

    class Audio:
        kind, name, dim, identity = "audio", "free-audio", 768, {"encoder": "none"}
        front_end, module = KALDI, ast.module
        segments, step_times = ast.segments, ast.step_times

        def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
            return logmel[:, :steps].repeat(1, 1, self.dim // KALDI.bins)

    return Visual(), Audio()


if __name__ == "__main__":
    print(json.dumps(extract_one(Path(sys.argv[1]), Path(sys.argv[2]))))
