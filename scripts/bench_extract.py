"""Benchmark of extraction on this machine: ratios from one run.

    python scripts/bench_extract.py                 encoders of real size
    python scripts/bench_extract.py --size tiny     the demo's encoders
    python scripts/bench_extract.py --device cuda --precision bfloat16 --compile     on a GPU

Decode-only runs the same workers on the same clips and throws their messages away; encode-only puts the same number of
rows, already in memory, through the same batchers: half of them before the extraction and half after it, because
machines change their pace. No overlap can beat the larger of the two. Encoders are built before any clock starts.
Real-size encoders have random weights: speed does not depend on their values.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

CLIP_SIZE, CLIP_RATE = 256, 25
Row = tuple[str, str, str]  # name, value, goal


def main() -> None:
    """Parse, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=["real", "tiny"], default="real")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="float32", help="float32; bfloat16 or float16 on CUDA")
    parser.add_argument("--compile", action="store_true", help="compile the encoders with torch")
    parser.add_argument("--shards", action="store_true", help="also compare two processes with one, a core each")
    parser.add_argument(
        "--public", type=Path, metavar="PYTHON", help="also a public tool (see scripts/public_extractor.py)"
    )
    parser.add_argument(
        "--memory", type=int, nargs="*", metavar="MINUTES", help="also peak memory for clips of these lengths (1 30)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value, goal in _rows(options, Path(folder)):  # each as soon as it is known
            print(f"{name:36}  {value:>12}  {goal}", flush=True)


def _rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    yield "vaflow --help, seconds", f"{_help_seconds():.2f}", "0.5 at most"
    if options.memory is not None:
        from long_clips import measure_memory  # beside this file, as those below

        yield from measure_memory(folder, options.memory or [1, 30])
    data = folder / "data"
    data.mkdir()
    clips = [data / f"clip{number}.mp4" for number in range(options.clips)]
    for number, clip in enumerate(clips):
        write_clip(clip, options.seconds, seed=number)
    yield from _overlap(_bench(options, data, folder), folder)
    if options.shards:
        from shard_scaling import scaling

        yield "2 processes with --shard / 1", f"{scaling(data, folder):.2f}", "2 at best"
    if options.public:
        from public_extractor import MODEL, versus

        ours, theirs = versus(options.public, clips, CLIP_RATE, folder)
        yield "vaflow / clip-video-encode", f"{ours / theirs:.2f}", f"{MODEL}: {ours:.1f} and {theirs:.1f} images/s"


@dataclass(frozen=True)
class Bench:
    """What is measured, on what, with what; `plain`: both encoders in float32, as in a model just loaded."""

    dataset: Any
    config: Any
    device: Any
    visual: Any
    audio: Any
    plain: tuple[Any, Any]

    @property
    def seconds(self) -> float:
        """Of video."""
        from vaflow.extract.durations import lengths

        return sum(lengths(self.dataset.clips).values())


def _bench(options: argparse.Namespace, data: Path, folder: Path) -> Bench:
    from vaflow.datasets import open_dataset
    from vaflow.device import choose_device
    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.encoding import compile_network

    device = choose_device(options.device)
    visual, audio = _encoders(options.size, options.device, options.precision, folder)
    plain = _encoders(options.size, options.device, "float32", folder)
    if options.compile:
        compile_network(visual)
        compile_network(audio)
    config = ExtractConfig(
        visual=(visual.name,),
        audio=(audio.name,),
        device=options.device,
        precision=options.precision,
        compile=options.compile,
        workers=options.workers,
        face_source="none",
    )
    return Bench(open_dataset(data, "videos"), config, device, visual, audio, plain)


def _overlap(bench: Bench, folder: Path) -> Iterator[Row]:
    from crop_folders import with_crops
    from encoder_rate import device_name, encode_only, matrix_rate

    from vaflow.extract.encoding import BATCH_SIZES
    from vaflow.extract.loop import idle_share

    precision = bench.config.precision + ", compiled" * bench.config.compile
    most = matrix_rate(bench.device, bench.config.precision)
    yield "matrix product, TFLOP/s", f"{most:.2f}", f"{precision} on {device_name(bench.device)}"
    decode, counts = _decode_only(bench.dataset, bench.config, bench.visual)
    yield "decode only, seconds", f"{decode:.2f}", ""
    dataset = with_crops(bench.dataset, folder / "crops")
    crops, _ = _decode_only(dataset, replace(bench.config, face_source="auto"), bench.visual)
    yield "decode only, video / crops", f"{decode / crops:.2f}", "1 at least: JPEG folders as fast as video"
    rate, each = _main_thread(dataset, folder / "free")
    yield "main thread, pictures/s", f"{rate:.0f}", f"encoders that cost nothing; a worker reads {each:.0f} crops/s"
    sizes = {"images": BATCH_SIZES[bench.device.type]["visual"], "windows": BATCH_SIZES[bench.device.type]["audio"]}
    half = {kind: count // 2 // sizes[kind] * sizes[kind] for kind, count in counts.items()}  # whole batches
    before = encode_only(bench.config, bench.device, bench.visual, bench.audio, **half)
    whole, summary = _whole(bench, folder / "cache")
    half = {kind: count - half[kind] for kind, count in counts.items()}
    after = encode_only(bench.config, bench.device, bench.visual, bench.audio, **half)
    images, windows = (one + other for one, other in zip(before, after, strict=True))
    encode = images.seconds + windows.seconds
    yield "encode only, seconds", f"{encode:.2f}", f"{images.rows} images, {windows.rows} windows"
    yield "images/s", f"{images.per_second:.1f}", f"{images.tera / most:.0%} of the matrix rate; goal on a GPU: 45 %"
    yield "windows/s", f"{windows.per_second:.1f}", f"{windows.tera / most:.0%} of the matrix rate"
    yield "extract, seconds", f"{whole:.2f}", f"the device idle {idle_share(summary.stages):.0%} of it"
    yield "extract / max(decode, encode)", f"{whole / max(decode, encode):.3f}", "1.05 at most"
    rate = summary.encoded[bench.visual.name] / bench.seconds
    yield "frames encoded per second of video", f"{rate:.2f}", f"{bench.config.frames / bench.config.window:g}"
    baseline = _per_window(bench, bench.visual, bench.audio)
    yield "per-window pipeline, seconds", f"{baseline:.2f}", "every window by itself: scripts/per_window.py"
    yield "per-window pipeline / extract", f"{baseline / whole:.2f}", "3 at least on long clips"
    if bench.config.precision != "float32":
        baseline = _per_window(bench, *bench.plain)
        yield "per-window in float32 / extract", f"{baseline / whole:.2f}", "3 at least on long clips"


def write_clip(path: Path, seconds: float, *, seed: int = 0, size: int = CLIP_SIZE, rate: int = CLIP_RATE) -> None:
    """An H.264 + AAC clip of moving noise blobs and a gliding tone."""
    import av

    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (size, size, 3), np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        for k in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 3 * k, axis=1), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        at = np.arange(round(seconds * 16000)) / 16000
        tone = (0.3 * np.sin(2 * np.pi * (200 * at + 5 * at**2))).astype(np.float32)
        block = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        block.sample_rate = 16000
        container.mux(audio.encode(block))
        container.mux(audio.encode())


def _encoders(size: str, device: str, precision: str, folder: Path) -> tuple[Any, Any]:
    from vaflow.encoders import build_encoder

    if size == "tiny":
        return (
            build_encoder("clip-tiny", device=device, precision=precision),
            build_encoder("ast-tiny", device=device, precision=precision),
        )
    from random_weights import random_ast, random_clip  # beside this file

    return random_clip(device, precision, folder), random_ast(device, precision)


def _jobs(dataset: Any, config: Any, visual: Any) -> list[Any]:
    from vaflow.extract.decoding_pool import Job

    return [
        Job(number, clip, config.grid, True, True, config.face_source, (visual.preparation,), False)
        for number, clip in enumerate(dataset.clips)
    ]


def _decode_only(dataset: Any, config: Any, visual: Any) -> tuple[float, dict[str, int]]:
    from vaflow.extract.config import default_workers
    from vaflow.extract.decoding_pool import Clock, Face, Failed, WorkerPool
    from vaflow.extract.worker import run_job

    counts = {"images": 0, "windows": 0}
    began = time.perf_counter()
    workers = config.workers or default_workers(config.device)
    with WorkerPool(_jobs(dataset, config, visual), workers, run_job) as pool:
        for message in pool:
            if isinstance(message, Failed):
                raise SystemExit(f"decoding failed: {message.message}")
            counts["images"] += isinstance(message, Face)
            if isinstance(message, Clock):
                counts["windows"] += len(config.grid.starts(message.duration))
    return time.perf_counter() - began, counts


def _main_thread(dataset: Any, out: Path) -> tuple[float, float]:
    """Pictures per second of the main thread's own time, and per second of one worker; ten times the usual frames."""
    from long_clips import free_encoders
    from torch import device

    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.pipeline import extract_with

    visual, audio = free_encoders()
    config = ExtractConfig(visual=(visual.name,), audio=(audio.name,), device="cpu", workers=1, frames=200)
    began, worked = time.perf_counter(), time.thread_time()
    summary = extract_with(dataset, out, config, [visual], [audio], device("cpu"))
    images_encoded = summary.encoded[visual.name]
    return images_encoded / (time.thread_time() - worked), images_encoded / (time.perf_counter() - began)


def _whole(bench: Bench, out: Path) -> tuple[float, Any]:
    from vaflow.extract.pipeline import extract_with

    began = time.perf_counter()
    summary = extract_with(bench.dataset, out, bench.config, [bench.visual], [bench.audio], bench.device)
    seconds = time.perf_counter() - began
    if summary.failures:
        raise SystemExit(f"extraction failed: {summary.failures[0].message}")
    return seconds, summary


def _per_window(bench: Bench, visual: Any, audio: Any) -> float:
    from per_window import encode_clip  # beside this file

    grid, steps = bench.config.grid, bench.config.audio_steps
    began = time.perf_counter()
    for clip in bench.dataset.clips:
        encode_clip(clip.video, grid, visual, audio, steps=steps, device=bench.device)
    return time.perf_counter() - began


def _help_seconds() -> float:
    command = [sys.executable, "-c", "from vaflow.cli import main; main(['--help'])"]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
