"""The streams of an extraction: names, shapes, fingerprints, and the sources that each depends on."""

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

# The parts of a clip's source that each kind of stream depends on: a change of another part does not affect it.
SOURCES: dict[str, tuple[str, ...]] = {
    "visual": ("video", "frames", "crops"),
    "pixels": ("video", "frames", "crops"),
    "audio": ("video", "frames", "audio"),
    "logmel": ("video", "frames", "audio"),
    "labels": ("video", "frames", "labels", "dimensions", "split", "group"),
}


def text_stream(visual: str) -> str:
    """Return the name of the stream of prompt prototypes in a visual encoder's joint space."""
    return f"{visual}.text"


def stream_infos(
    config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> dict[str, StreamInfo]:
    """Return every per-clip stream of an extraction by name, in commit order."""
    faces = {"source": config.face_source, **faces_identity(detector=config.detector)}
    frame_decoder = nvdec_identity() if config.decoder == "nvdec" else decoder_identity()
    picture = {"faces": faces, "decoder": frame_decoder}
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
            e.identity | {"sampling": sampling, "sound": _audio_input(e, config), "decoder": decoder_identity()},
        )
        for e in audio
    ]
    # Labels last: a clip is complete once its clock and annotation are committed.
    infos.append(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "decoder": decoder_identity()}))
    return {info.name: info for info in infos}


def _audio_input(encoder: AudioEncoder, config: ExtractConfig) -> str:
    """Return an audio encoder's input: the log-Mel as stored, or frames of another front end, which are not stored."""
    dtype = config.dtype if encoder.front_end == KALDI else "float32"
    return f"{encoder.front_end.name} {dtype}"


def text_info(encoder: VisualEncoder) -> StreamInfo:
    """Return the stream of prompt prototypes of a visual encoder with a text tower; always float32."""
    identity = {key: value for key, value in encoder.identity.items() if key != "precision"}
    return StreamInfo(text_stream(encoder.name), "text", encoder.dim, "float32", identity)


def source_of(kind: str, sources: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a clip's sources that a stream of this kind depends on."""
    return {part: sources[part] for part in SOURCES[kind] if part in sources}


def provenance() -> dict[str, str]:
    """Return the program version that every record stores."""
    return {"vaflow": __version__}
