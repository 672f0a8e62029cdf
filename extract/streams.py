"""Which streams an extraction writes, and what identifies each: names, shapes, fingerprints, sources."""

from typing import Any

from vaflow import __version__
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, StreamInfo
from vaflow.encoders.base import KALDI, AudioEncoder, VisualEncoder
from vaflow.encoders.logmel import MEL_BINS
from vaflow.encoders.logmel import identity as logmel_identity
from vaflow.extract.config import ExtractConfig
from vaflow.extract.faces import faces_identity
from vaflow.extract.nvdec import nvdec_identity
from vaflow.extract.video import decoder_identity

# Which parts of a clip's source each kind of stream is made from: a change of any other part leaves it alone.
SOURCES: dict[str, tuple[str, ...]] = {
    "visual": ("video", "frames", "crops"),
    "pixels": ("video", "frames", "crops"),
    "audio": ("video", "frames", "audio"),
    "logmel": ("video", "frames", "audio"),
    "labels": ("video", "frames", "labels", "dimensions", "split", "group"),
}


def text_stream(visual: str) -> str:
    """Name of the stream of prompt prototypes in a visual encoder's joint space."""
    return f"{visual}.text"


def stream_infos(
    config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> dict[str, StreamInfo]:
    """Every per-clip stream of an extraction by name, in the order in which they are committed."""
    picture = {"faces": _face_identity(config), "decoder": _picture_decoder(config)}
    sampling = config.sampling
    infos = [
        StreamInfo(
            LOGMEL,
            "logmel",
            MEL_BINS,
            config.dtype,
            {"encoder": LOGMEL, **logmel_identity(), "decoder": decoder_identity()},
        )
    ]
    if config.pixels:
        infos.append(
            StreamInfo(PIXELS, "pixels", 0, "uint8", {"encoder": "jpeg", "sampling": sampling, "picture": picture})
        )
    infos += [
        StreamInfo(e.name, "visual", e.dim, config.dtype, e.identity | {"sampling": sampling, "picture": picture})
        for e in visual
    ]
    infos += [
        StreamInfo(
            e.name,
            "audio",
            e.dim,
            config.dtype,
            e.identity | {"sampling": sampling, "sound": _sound_read(e, config), "decoder": decoder_identity()},
        )
        for e in audio
    ]
    # Labels come last: a clip exists once its clock and annotation do.
    infos.append(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "decoder": decoder_identity()}))
    return {info.name: info for info in infos}


def _sound_read(encoder: AudioEncoder, config: ExtractConfig) -> str:
    """What an audio encoder reads: the log-Mel as stored, or frames of its own, which are not stored."""
    dtype = config.dtype if encoder.front_end == KALDI else "float32"
    return f"{encoder.front_end.name} {dtype}"


def text_info(encoder: VisualEncoder) -> StreamInfo:
    """The stream of prompt prototypes that belongs to a visual encoder with a text tower, which is always float32."""
    identity = {key: value for key, value in encoder.identity.items() if key != "precision"}
    return StreamInfo(text_stream(encoder.name), "text", encoder.dim, "float32", identity)


def source_of(kind: str, sources: dict[str, Any]) -> dict[str, Any]:
    """The part of a clip's sources that a stream of this kind is made from."""
    return {part: sources[part] for part in SOURCES[kind] if part in sources}


def provenance() -> dict[str, str]:
    """What every record says of its maker."""
    return {"vaflow": __version__}


def _picture_decoder(config: ExtractConfig) -> dict[str, Any]:
    return nvdec_identity() if config.decoder == "nvdec" else decoder_identity()


def _face_identity(config: ExtractConfig) -> dict[str, Any]:
    return {"source": config.face_source, **faces_identity(detector=config.detector)}
