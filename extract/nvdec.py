"""Decoding on a GPU (NVDEC) through torchcodec: `--decoder nvdec`. Experimental: never run on a GPU.

Frame times, and so the choice of frames, come from PyAV, and every frame must have the presentation time that it was
requested for. Colours are converted by other code than FFmpeg's, so pixels differ a little: streams have another
fingerprint, and the first clip is compared with PyAV.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import MediaError, UsageError, VaflowError, explain
from vaflow.extract.container import frame_times, opened
from vaflow.extract.video import decoder_identity, frames_at
from vaflow.process import beat
from vaflow.timeline import Floats, Ints

logger = logging.getLogger(__name__)

AT_ONCE = 8  # frames decoded at once
COMPARED = 8  # frames that are compared with PyAV: the first of a clip
# Grey levels of 255, on average over all pixels and channels. On three real clips two settings of FFmpeg's own
# conversion differ by 1.3 to 1.7, a wrong colour matrix by 1.6 to 2.2 (so it is not told apart), a wrong range by 7.6
# and more. The difference of NVDEC has not been measured.
TOLERANCE = 3.0
_LATE = 1e-5  # seconds added to a frame's time, so that rounding does not select the one before
_SAME = 1e-4  # seconds by which requested and returned times may differ


def import_torchcodec() -> Any:
    """Import torchcodec with its decoders.

    Raises:
        UsageError: it is not installed, or does not find FFmpeg's libraries.
    """
    remedy = "Use --decoder pyav, or install FFmpeg's shared libraries and, in the clone: pip install -e '.[nvdec]'"
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        got = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(explain("--decoder nvdec needs torchcodec", got=got, remedy=remedy)) from error
    if torchcodec.ffmpeg_major_version is None:  # it can be imported without them, for images only
        raise UsageError(explain("torchcodec does not find FFmpeg's shared libraries", remedy=remedy))
    return torchcodec


def require_nvdec(device: str) -> None:
    """Check that NVDEC can be used, before the first clip.

    Raises:
        UsageError: torchcodec is missing, or `device` is not a GPU.
    """
    import_torchcodec()
    if not device.startswith("cuda"):
        remedy = "Use --decoder pyav, or run on a machine with an NVIDIA GPU"
        raise UsageError(explain("--decoder nvdec needs a GPU", expected="--device cuda", got=device, remedy=remedy))


def nvdec_identity() -> dict[str, Any]:
    """Identity of the frame decoder, for the fingerprint; the clock is PyAV's."""
    return {"backend": "torchcodec nvdec", "version": import_torchcodec().__version__, "clock": decoder_identity()}


def frames_on_gpu(path: Path, targets: Ints, times: Floats, device: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """As `vaflow.extract.video.frames_at`, decoded by `device`.

    Raises:
        MediaError: the GPU cannot decode this file, or returns another frame than the requested one.
    """
    if not len(targets):
        return
    with opened(path) as media:
        start, stream = media.start, media.need_video().index
        if media.pixel_aspect != 1:
            raise _cannot(path, f"pixels that are not square ({media.pixel_aspect})")
    try:
        decoder = _open(path, stream, device)
        for begin in range(0, len(targets), AT_ONCE):
            numbers = np.asarray(targets[begin : begin + AT_ONCE], np.int64)
            requested = times[numbers]
            batch = decoder.get_frames_played_at(seconds=(requested + start + _LATE).tolist())
            returned = batch.pts_seconds.cpu().numpy() - start
            off = np.abs(returned - requested)
            if (off > _SAME).any():
                worst = int(off.argmax())
                problem = f"the frame at {returned[worst]:.4f} s instead of the one at {requested[worst]:.4f} s"
                raise _cannot(path, problem)
            yield from zip(numbers.tolist(), batch.data.cpu().numpy(), strict=True)
            beat()
    except MediaError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise _cannot(path, str(error).strip().partition("\n")[0]) from error


def _open(path: Path, stream: int, device: str) -> Any:
    decoders = import_torchcodec().decoders
    with decoders.set_cuda_backend("beta"):  # NVDEC itself; later versions take the name for their default
        decoder = decoders.VideoDecoder(str(path), stream_index=stream, dimension_order="NHWC", device=device)
    if decoder.cpu_fallback:  # decoded on the CPU by code that the fingerprint does not name
        raise _cannot(path, str(decoder.cpu_fallback))
    return decoder


def _cannot(path: Path, got: str) -> MediaError:
    remedy = "Use --decoder pyav and a new cache: the fingerprint names the decoder"
    return MediaError(explain(f"{path} cannot be decoded by the GPU", got=got, remedy=remedy))


def check_parity(path: Path, device: str) -> float:
    """Mean difference, in grey levels, between NVDEC's and PyAV's first frames of a file; it is logged.

    Raises:
        VaflowError: it is above `TOLERANCE`: other frames, or other colours.
        MediaError: the file cannot be decoded.
    """
    times = frame_times(path)
    numbers = np.arange(min(COMPARED, len(times)))
    pairs = zip(frames_at(path, numbers, times), frames_on_gpu(path, numbers, times, device), strict=True)
    differences = [
        float(np.abs(one.astype(np.int16) - other).mean()) if one.shape == other.shape else float("inf")
        for (_, one), (_, other) in pairs
    ]
    mean = float(np.mean(differences))
    if not mean <= TOLERANCE:
        problem = f"NVDEC and PyAV decode different frames of {path}"
        expected = f"a mean difference of at most {TOLERANCE:g} grey levels over {len(numbers)} frames"
        raise VaflowError(explain(problem, expected=expected, got=f"{mean:.2f}", remedy="Use --decoder pyav"))
    logger.info("NVDEC and PyAV differ by %.2f grey levels on average (%d frames of %s)", mean, len(numbers), path.name)
    return mean
