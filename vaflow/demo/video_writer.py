"""Writes H.264 video with AAC audio, every frame at its own presentation time."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vaflow.demo.curves import Floats
from vaflow.demo.drawing import Image

CLOCK = Fraction(1, 30_000)  # divides 15, 25, 30 and 30000/1001 frames per second exactly
QUALITY = "23"
BLOCK = 1024  # samples of one AAC frame


def on_clock(times: Floats) -> Floats:
    """Presentation times as the file keeps them: rounded to its clock."""
    return np.rint(np.asarray(times) / float(CLOCK)) * float(CLOCK)


def write_video(
    path: Path, frames: Iterable[Image], times: Floats, samples: NDArray[np.float32] | None, sample_rate: int
) -> None:
    """Encode one file.

    Args:
        path: an .mp4 file to write.
        frames: N images [H, W, 3], BGR uint8, H and W even and the same for all.
        times: [N] presentation times in seconds, ascending.
        samples: [S] mono or [S, 2] stereo in [-1, 1], or None for a file without an audio stream.
        sample_rate: of the samples, in Hz.
    """
    with av.open(str(path), "w") as container:
        video: VideoStream | None = None
        audio: AudioStream | None = None
        blocks: list[tuple[float, av.AudioFrame]] = []
        if samples is not None:
            layout = "mono" if samples.ndim == 1 else "stereo"
            audio = container.add_stream("aac", rate=sample_rate, layout=layout)
            audio.bit_rate = 48_000 * (1 if samples.ndim == 1 else 2)
            blocks = _audio_blocks(samples, sample_rate, layout)
        for frame, time in zip(frames, times, strict=True):
            if video is None:
                video = _video_stream(container, frame, times)
            while audio is not None and blocks and blocks[0][0] <= time:
                container.mux(audio.encode(blocks.pop(0)[1]))
            image = av.VideoFrame.from_ndarray(frame, format="bgr24")
            image.pts, image.time_base = round(time / float(CLOCK)), CLOCK
            container.mux(video.encode(image))
        for _, block in blocks:
            container.mux(audio.encode(block) if audio is not None else [])
        for stream in (video, audio):
            if stream is not None:
                container.mux(stream.encode(None))


def _video_stream(container: av.container.OutputContainer, frame: Image, times: Floats) -> VideoStream:
    rate = Fraction(len(times) - 1, 1) / Fraction(float(times[-1] - times[0])).limit_denominator(30_000)
    stream = container.add_stream("libx264", rate=rate.limit_denominator(30_000))
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.options = {"preset": "ultrafast", "crf": QUALITY, "g": "60"}
    stream.codec_context.time_base = CLOCK
    stream.codec_context.thread_count = 1
    stream.time_base = CLOCK
    return stream


def _audio_blocks(samples: NDArray[np.float32], rate: int, layout: str) -> list[tuple[float, av.AudioFrame]]:
    """The samples in AAC frames, each with its time in seconds; the last one may be shorter."""
    planes = np.atleast_2d(np.ascontiguousarray(samples.T, dtype=np.float32))
    blocks: list[tuple[float, av.AudioFrame]] = []
    for begin in range(0, planes.shape[1], BLOCK):
        part = np.ascontiguousarray(planes[:, begin : begin + BLOCK])
        block = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        block.sample_rate, block.pts, block.time_base = rate, begin, Fraction(1, rate)
        blocks.append((begin / rate, block))
    return blocks
