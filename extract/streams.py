"""Streams that an extraction writes: names, shapes, identities, and the sources that each is made from."""

from dataclasses import replace
from typing import Any

from vaflow import __version__
from vaflow.cache.schema import CROPS, FACES, LABELS, LOGMEL, PIXELS, StreamInfo
from vaflow.encoders.base import KALDI, AudioEncoder, VisualEncoder
from vaflow.encoders.logmel import MEL_BINS
from vaflow.encoders.logmel import identity as logmel_identity
from vaflow.extract.config import ExtractConfig
from vaflow.extract.faces import faces_identity, tracker_identity
from vaflow.extract.faces.choice import LARGEST
from vaflow.extract.nvdec import nvdec_identity
from vaflow.extract.video import READING, decoder_identity

# Parts of a clip's source that each kind of stream is made from; a change of another part does not affect it.
SOURCES: dict[str, tuple[str, ...]] = {
    "visual": ("video", "frames", "crops"),
    "pixels": ("video", "frames", "crops"),
    "faces": ("video", "frames", "crops"),
    "crops": ("video", "frames", "crops"),
    "audio": ("video", "frames", "audio"),
    "logmel": ("video", "frames", "audio"),
    "labels": ("video", "frames", "labels", "dimensions", "person_labels", "split", "group"),
}


def text_stream(visual: str) -> str:
    """Name of the stream of prompt prototypes in a visual encoder's joint space."""
    return f"{visual}.text"


def stream_infos(
    config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> dict[str, StreamInfo]:
    """Every per-clip stream of an extraction by name, in the order in which they are committed."""
    decoder = nvdec_identity() if config.decoder == "nvdec" else decoder_identity()
    tracker = tracker_identity(config.person, config.identity)
    image_identity = {
        "faces": {"source": config.face_source, **faces_identity(detector=config.detector, tracker=tracker)},
        "decoder": decoder,
    }
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
    if config.face_source != "none" and config.person != LARGEST and (visual or config.pixels):
        # The choice of a person does not change the set of faces.
        everyone = {key: value for key, value in tracker.items() if key != "person"}
        faces = {"source": config.face_source, **faces_identity(detector=config.detector, tracker=everyone)}
        pictures = {"sampling": sampling, "picture": {"faces": faces, "decoder": decoder}}
        if stores_everyone(config):
            infos.append(StreamInfo(CROPS, "crops", 0, "uint8", {"encoder": "jpeg", **pictures}))
        infos.append(StreamInfo(FACES, "faces", 0, "float32", {"encoder": FACES, **pictures}))
    if config.pixels:
        infos.append(
            StreamInfo(
                PIXELS, "pixels", 0, "uint8", {"encoder": "jpeg", "sampling": sampling, "picture": image_identity}
            )
        )
    infos += [
        StreamInfo(
            e.name, "visual", e.dim, config.dtype, e.identity | {"sampling": sampling, "picture": image_identity}
        )
        for e in visual
    ]
    infos += [
        StreamInfo(
            e.name,
            "audio",
            e.dim,
            config.dtype,
            e.identity
            | {
                "sampling": sampling,
                # The stored log-Mel, or frames of the encoder's own front end, which are not stored.
                "sound": f"{e.front_end.name} {config.dtype if e.front_end == KALDI else 'float32'}",
                "decoder": decoder_identity(),
            },
        )
        for e in audio
    ]
    # Labels are committed last: a clip exists once its clock and annotation do.
    infos.append(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "decoder": decoder_identity()}))
    return {info.name: info for info in infos}


def stores_everyone(config: ExtractConfig) -> bool:
    """Whether the crops of everyone are stored in clips with several people."""
    detected = config.face_source != "none" and config.person != LARGEST and bool(config.visual or config.pixels)
    return detected and not config.chosen_only


def text_info(encoder: VisualEncoder) -> StreamInfo:
    """Stream of prompt prototypes of a visual encoder with a text tower; always float32."""
    identity = {key: value for key, value in encoder.identity.items() if key != "precision"}
    return StreamInfo(text_stream(encoder.name), "text", encoder.dim, "float32", identity)


def source_of(kind: str, sources: dict[str, Any]) -> dict[str, Any]:
    """Parts of a clip's sources used by a stream of this kind."""
    return {part: sources[part] for part in SOURCES[kind] if part in sources}


def provenance() -> dict[str, Any]:
    """Members of every record that state the software version."""
    return {"vaflow": __version__, "reading": READING}


def reading_version(info: StreamInfo) -> int:
    """Version of reading media (`vaflow.extract.video.READING`) that a stream was declared with."""
    decoder = info.identity.get("decoder") or info.identity.get("picture", {}).get("decoder", {})
    return int(decoder.get("clock", decoder).get("reading", READING))


def as_declared(info: StreamInfo, known: StreamInfo | None) -> StreamInfo:
    """`info`, or the stream of that name in the cache if the two differ in an older reading version only.

    A cache of an older version can then be added to: the plan makes those of its items anew that were read wrongly.
    """
    if known is None or reading_version(known) >= READING:
        return info
    older = replace(info, identity=_with_reading(info.identity, reading_version(known)))
    return known if older.identity == known.identity else info


def _with_reading(identity: Any, version: int) -> Any:
    if not isinstance(identity, dict):
        return identity
    return {key: version if key == "reading" else _with_reading(value, version) for key, value in identity.items()}
