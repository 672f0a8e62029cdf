"""Streams that an extraction writes: names, shapes, identities, and the sources that each is made from.

The stream of a visual encoder with a text tower comes with one of prompt sets: descriptions of the nine regions,
embedded in its joint space.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vaflow import __version__
from vaflow.cache import Cache
from vaflow.cache.commit import differences
from vaflow.cache.schema import CROPS, FACES, LABELS, LOGMEL, PIXELS, Rows, StreamInfo
from vaflow.encoders import ENCODERS, build_encoder, encoder_kind, is_encoder
from vaflow.encoders.base import KALDI, AudioEncoder, VisualEncoder, recorded_identity
from vaflow.encoders.logmel import MEL_BINS, logmel_identity
from vaflow.encoders.prompts import PromptSet, load_prompts, prototypes
from vaflow.errors import FingerprintError, UsageError, command, explain
from vaflow.extract.config import ExtractConfig
from vaflow.extract.faces.choice import ALL, LARGEST
from vaflow.extract.faces.crops import CROP_SIZE, JPEG_QUALITY, TEMPLATE, TEMPLATE_VERSION
from vaflow.extract.faces.detection import DETECTOR, MAX_OVERLAP, MAX_SIZE, MIN_SCORE, model_digest
from vaflow.extract.faces.identity import network_identity, resolve
from vaflow.extract.faces.tracking import ALL_FACES_VERSION, CUTS_VERSION, TRACKER_VERSION
from vaflow.extract.video import READING, decoder_identity, nvdec_identity

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
    clock, sampling = decoder_identity(), config.sampling
    decoder = nvdec_identity() if config.decoder == "nvdec" else clock
    tracker = tracker_identity(config.person, config.identity)

    def images(tracker: dict[str, Any]) -> dict[str, Any]:
        faces = {"source": config.face_source, **faces_identity(detector=config.detector, tracker=tracker)}
        return {"sampling": sampling, "picture": {"faces": faces, "decoder": decoder}}

    logmel = {"encoder": LOGMEL, **logmel_identity(), "decoder": clock}
    infos = [StreamInfo(LOGMEL, "logmel", MEL_BINS, config.dtype, logmel)]
    if config.face_source != "none" and config.person != LARGEST and (visual or config.pixels):
        # The choice of a person does not change the set of faces.
        everyone = images({key: value for key, value in tracker.items() if key != "person"})
        if stores_everyone(config):
            infos.append(StreamInfo(CROPS, "crops", 0, "uint8", {"encoder": "jpeg", **everyone}))
        infos.append(StreamInfo(FACES, "faces", 0, "float32", {"encoder": FACES, **everyone}))
    if config.pixels:
        infos.append(StreamInfo(PIXELS, "pixels", 0, "uint8", {"encoder": "jpeg", **images(tracker)}))
    infos += [StreamInfo(e.name, "visual", e.dim, config.dtype, e.identity | images(tracker)) for e in visual]
    for e in audio:
        # The stored log-Mel, or frames of the encoder's own front end, which are not stored.
        frames = f"{e.front_end.name} {config.dtype if e.front_end == KALDI else 'float32'}"
        identity = e.identity | {"sampling": sampling, "sound": frames, "decoder": clock}
        infos.append(StreamInfo(e.name, "audio", e.dim, config.dtype, identity))
    # Labels are committed last: a clip exists once its clock and annotation do.
    infos.append(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "decoder": clock}))
    return {info.name: info for info in infos}


def faces_identity(detector: str = "opencv", tracker: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return everything that changes the pixels of a crop: part of the fingerprint of what is made from crops.

    Args:
        detector: runtime of the network: "opencv", or "torch" (OpenCV then still resizes and cuts).
        tracker: see `tracker_identity`; by default one face is followed.
    """
    import cv2
    from PIL import __version__ as pillow

    opencv = f"opencv {cv2.__version__}"
    return {
        "detector": DETECTOR,
        "model": model_digest(),
        "runtime": f"torch {version('torch').partition('+')[0]}, {opencv}" if detector == "torch" else opencv,
        "max_size": MAX_SIZE,
        "min_score": MIN_SCORE,
        "max_overlap": MAX_OVERLAP,
        **(tracker or tracker_identity(LARGEST, "none")),
        "template": {"version": TEMPLATE_VERSION, "points": TEMPLATE.tolist()},
        "crop_size": CROP_SIZE,
        "jpeg": {"quality": JPEG_QUALITY, "subsampling": "4:4:4", "library": f"pillow {pillow}"},
    }


def tracker_identity(person: str, identity: str) -> dict[str, Any]:
    """Return what decides whose face a crop shows: `person` and `identity` as in the settings of an extraction.

    Streams made before all faces were tracked have `{"tracker": 1}` and no person: that is "largest".
    """
    if person == LARGEST:
        return {"tracker": TRACKER_VERSION}
    people = {"cuts": CUTS_VERSION, **network_identity(resolve(identity))}
    return {"tracker": ALL_FACES_VERSION, "person": person, "people": people}


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
    """`info`, with the identity of the stream in the cache if that differs only in what an older version recorded.

    A cache of an older version can then be added to: the plan makes those of its items anew that were read wrongly.
    """
    if known is None:
        return info
    identity = _with_reading(info.identity, min(reading_version(known), READING))
    return replace(info, identity=known.identity) if recorded_identity(known.identity) == identity else info


def _with_reading(identity: Any, version: int) -> Any:
    if not isinstance(identity, dict):
        return identity
    return {key: version if key == "reading" else _with_reading(value, version) for key, value in identity.items()}


@dataclass(frozen=True)
class ListedSet:
    """One prompt set in a cache.

    Attributes:
        stream: stream of the prototypes; name: of the set, the value of a training run's `prompts` setting.
        templates, descriptions: the texts; empty if the record has none.
        created: when it was embedded.
    """

    stream: str
    name: str
    templates: tuple[str, ...]
    descriptions: tuple[str, ...]
    created: str


@dataclass
class AddedPrompts:
    """Name of the set, and the streams in which it is new, replaced another version, or is unchanged."""

    name: str
    new: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def list_prompts(cache: Cache) -> list[ListedSet]:
    """Return every prompt set of every stream of prototypes."""
    sets = []
    for stream, info in cache.streams().items():
        for name in cache.items(stream=stream) if info.kind == "text" else []:
            record = cache.record(stream, name)
            words = record.source.get("prompts") or {}
            templates, descriptions = (tuple(words.get(key, ())) for key in ("templates", "descriptions"))
            sets.append(ListedSet(stream, name, templates, descriptions, record.created))
    return sets


@dataclass(frozen=True)
class EmbeddedSet:
    """A prompt set in the joint space of one encoder, not yet in the cache; without `arrays` if it is unchanged there.

    Attributes:
        stream: stream of the prototypes; set_name: of the set.
        replaces: the cache holds another version of the set.
    """

    stream: StreamInfo
    set_name: str
    source: dict[str, Any]
    arrays: dict[str, Rows] | None
    replaces: bool

    def commit(self, cache: Cache) -> None:
        """Write the set, and create its stream if there is none."""
        cache.declare(self.stream)
        if self.arrays is not None:
            cache.write(self.stream.name, self.set_name, self.arrays, source=self.source)


def embed_prompts(cache: Cache, prompt_set: PromptSet, visual: Iterable[VisualEncoder]) -> Iterator[EmbeddedSet]:
    """Embed a prompt set in the joint space of every encoder with a text tower, unless it is unchanged.

    Raises:
        FingerprintError: the prototypes in the cache are of another encoder.
    """
    source = {"prompts": prompt_set.identity()}
    for encoder in visual:
        if not hasattr(encoder, "encode_text"):
            continue
        info = text_info(encoder)
        stored = cache.has(info.name, prompt_set.name)
        if stored or info.name in cache.streams():
            cache.declare(info)
        arrays: dict[str, Rows] | None = None
        if not stored or cache.record(info.name, prompt_set.name).source != source:
            embedding, template = prototypes(encoder, prompt_set)
            arrays = {"embedding": embedding, "template": template}
        yield EmbeddedSet(info, prompt_set.name, source, arrays, stored)


def write_prompts(cache: Cache, prompt_set: PromptSet, visual: Iterable[VisualEncoder]) -> AddedPrompts:
    """Embed a prompt set and commit it; raises as `embed_prompts`."""
    done = AddedPrompts(prompt_set.name)
    for embedded in embed_prompts(cache, prompt_set, visual):
        embedded.commit(cache)
        new = done.replaced if embedded.replaces else done.new
        (done.unchanged if embedded.arrays is None else new).append(embedded.stream.name)
    return done


def add_prompts(
    cache: Cache,
    prompts: Path,
    visual: str | None = None,
    weights: Mapping[str, Path] | None = None,
    *,
    device: str = "cpu",
) -> AddedPrompts:
    """Embed the prompt set in a TOML file for the visual encoders of a cache. No clip is read.

    Args:
        prompts: the file; its stem names the set.
        visual: name of the encoder; None: all in the cache that have a text tower.
        weights: encoder name -> local weights, instead of the hub.
        device: "cpu" or "cuda[:N]".

    Raises:
        UsageError: the file is not a prompt set, or the cache has no such encoder, or it has no text tower.
        FingerprintError: the stream in the cache is of another encoder; every field that differs is named.
        WeightsError: weights are missing or do not fit.
    """
    prompt_set = load_prompts(prompts)
    known = cache.streams()
    # By default the streams with prototypes; without any, all streams of an encoder of this package.
    made = [name for name, info in known.items() if info.kind == "visual" and is_encoder(name, "visual")]
    default = [name for name in made if text_stream(name) in known] or made
    names = default if visual is None else [visual]
    unused = [name for name in weights or {} if name not in names]
    if unused:
        problem = "Weights were given for an encoder that is not used"
        raise UsageError(explain(problem, got=unused[0], choices=names))
    encoders = [_build(cache, known, name, (weights or {}).get(name), device) for name in names]
    able = [encoder for encoder in encoders if hasattr(encoder, "encode_text")]
    if not able:
        problem = f"No visual encoder of {cache.place} has a text tower"
        expected = "a CLIP encoder, such as clip-vit-b16"
        raise UsageError(explain(problem, expected=expected, got=", ".join(names) or "no stream of a known encoder"))
    return write_prompts(cache, prompt_set, able)


def _build(
    cache: Cache, known: Mapping[str, StreamInfo], name: str, weights: Path | None, device: str
) -> VisualEncoder:
    """Return the encoder of a stream.

    Raises:
        UsageError: the cache has neither the stream nor its prototypes, or the encoder is unknown.
        FingerprintError: the stream is of another encoder.
    """
    infos = [known[stream] for stream in (text_stream(name), name) if stream in known]
    if not infos:
        visual = [stream for stream, info in known.items() if info.kind == "visual"]
        raise UsageError(explain(f"{cache.place} has no visual stream of this name", got=name, choices=visual))
    if not is_encoder(name, "visual"):
        choices = [encoder for encoder in ENCODERS if encoder_kind(encoder) == "visual"]
        raise UsageError(explain(f"No visual encoder makes stream {name!r}", got=name, choices=choices))
    encoder = build_encoder(name, weights=weights, device=device)
    for info in infos:
        # The identity of a visual stream also has members beyond its encoder's: sampling, faces, precision.
        members = recorded_identity(info.identity).items()
        recorded = {key: value for key, value in members if key in encoder.identity}
        fields = "; ".join(differences(recorded, encoder.identity))
        if fields:
            problem = f"Stream {info.name!r} of {cache.place} is of another encoder: {fields}"
            remedy = f"Name the weights of the cache: --weights {name}=PATH"
            raise FingerprintError(explain(problem, remedy=remedy))
    return encoder  # type: ignore[return-value]


@dataclass
class NewStreams:
    """The streams of an extraction by name, and its prompts.

    They are added to the cache with the first commit: if every clip fails, the cache keeps no streams whose settings
    the next extraction would have to repeat.
    """

    infos: dict[str, StreamInfo]
    prompts: tuple[EmbeddedSet, ...]
    created: bool = False

    def create(self, cache: Cache) -> None:
        """Declare every stream and commit the prompts, once.

        Raises:
            FingerprintError: another process has declared one of them with other settings.
        """
        if not self.created:
            for info in self.infos.values():
                cache.declare(info)
            for embedded in self.prompts:
                embedded.commit(cache)
            self.created = True


def compare(
    cache: Cache, config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> dict[str, StreamInfo]:
    """Return the streams of an extraction, compared with those of the cache; nothing is written.

    Raises:
        FingerprintError: a stream in the cache was made with other settings, or of other people.
    """
    known = cache.streams()
    infos = {name: as_declared(i, known.get(name)) for name, i in stream_infos(config, visual, audio).items()}
    if FACES in known and CROPS not in known:  # of an earlier version: do not decode every clip again for its crops
        infos.pop(CROPS, None)
    _check_person(cache, known, infos)
    for name in infos.keys() & known.keys():
        cache.declare(infos[name])
    return infos


def prepare(cache: Cache, config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]) -> NewStreams:
    """As `compare`, and embed the prompts; only the lost file of a stream that has items is written.

    Raises:
        FingerprintError: a stream in the cache was made with other settings, or of other people.
    """
    infos = compare(cache, config, visual, audio)
    for info in infos.values():
        if cache.source_stamps(info.name):
            cache.declare(info)
    return NewStreams(infos, tuple(embed_prompts(cache, load_prompts(config.prompts), visual)))


def _check_person(cache: Cache, known: Mapping[str, StreamInfo], infos: Mapping[str, StreamInfo]) -> None:
    """Check that new streams are of the same people as the cache, whose items are clips or every person of them.

    Raises:
        FingerprintError: they are of another choice of people, or divide clips that the cache does not divide.
    """
    visual_last = sorted(known.items(), key=lambda stream: stream[1].kind == "visual")
    stored = {choice: name for name, info in visual_last if (choice := _choice(info))}  # choice -> a stream of it
    now = next(filter(None, map(_choice, infos.values())), "")
    others = {_choice(info) for name, info in known.items() if name in infos} - {"", now}
    everyone = f"--person {ALL}"
    if now and (others or (stored and now not in stored)):
        problem = f"{cache.place} has the features of another choice of people"
        rule = now.removeprefix("--person ")
        again = command("cache", "people", cache.place, "OTHER.cache", "--person", rule)
        again = f"To choose again without the videos: {again}" if CROPS in known and rule != LARGEST else ""
        remedy = again or "Use the choice of the cache, or extract into another cache"
        expected = ", ".join(sorted(others or stored))
        raise FingerprintError(explain(problem, expected=expected, got=now, remedy=remedy))
    if everyone in stored and not now:
        problem = f"{cache.place} has an item of every person, and this extraction would add an item of every clip"
        remedy = "Name a visual stream of the cache as well; it is not encoded again"
        name = stored[everyone]
        expected = f"{'--pixels' if name == PIXELS else f'--visual {name}'} {everyone}"
        raise FingerprintError(explain(problem, expected=expected, remedy=remedy))
    if now == everyone and not stored and cache.source_stamps(LABELS):
        problem = f"{cache.place} has an item of every clip, and {everyone} would add an item of every person"
        raise FingerprintError(explain(problem, remedy="Extract into another cache"))


def _choice(info: StreamInfo) -> str:
    """The people that a stream of images shows, as the option that chose them; "" if it is not of detected faces."""
    faces = info.identity.get("picture", {}).get("faces", {}) if info.kind in ("visual", "pixels") else {}
    if not faces or faces.get("source") == "none":
        return ""
    return f"--person {faces.get('person', LARGEST)}" + (" with --choices" if "choices" in faces else "")
