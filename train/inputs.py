"""Inputs of a run: the streams and prototypes that its settings, or the defaults, select in a cache, and their masks.

A run may mask faces of low quality and audio without speech.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaflow.cache import Cache
from vaflow.cache.layout import fingerprint
from vaflow.cache.schema import FACES, LOGMEL, Item, StreamInfo, stored_layers
from vaflow.encoders import is_encoder
from vaflow.errors import FingerprintError, UsageError, command, explain
from vaflow.timeline import Bools, Floats, Grid, median_interval
from vaflow.train.batch import AUDIO, VISUAL, StreamSpec, TargetSpec, target_specs
from vaflow.train.config import NONE, TrainConfig
from vaflow.train.folds import absolute_groups, with_folds

log = logging.getLogger(__name__)

PREFERRED = {VISUAL: "clip-vit-b16", AUDIO: "ast"}  # if a cache has several: the paper's streams
LOGMEL_INTERVAL = 0.01  # seconds between filter-bank frames, and between values of speech activity
_PEOPLE = tuple(f"picture.faces.{name}" for name in ("tracker", "person", "choices", "people"))
# Fields that can differ between the training cache and one to predict: they move samples, change low bits, or state
# which face is read. Older caches also have the version of transformers.
_LENIENT = (
    *("sampling", "decoder", "picture.decoder", "picture.faces.runtime", *_PEOPLE, "precision"),
    "settings.transformers_version",
)
SLOW_FRAMES, SLOW_STRIDE = 20, 6  # rows of a window, and between two windows, of features slower than the default
GOOD_SIZE = 48.0  # pixels of the frame
GOOD_SHARPNESS = 8.0  # gray levels


@dataclass(frozen=True)
class InputStream:
    """A stream that a run reads.

    Attributes:
        kind: kind in the cache: "visual", "audio" or "logmel".
        dim: width of a row, over all stored layers.
        steps: vectors per training window; for visual streams, the frames.
        fingerprint: digest of the stream's identity.
        identity: encoder, weights, preprocessing and sampling.
        frames_per_step: log-Mel frames that a CNN turns into one audio step; 0: each vector is a step.
    """

    name: str
    kind: str
    dim: int
    steps: int
    fingerprint: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    frames_per_step: int = 0

    @property
    def layers(self) -> int:
        """Number of encoder layers stored in a row."""
        return max(1, len(self.identity.get("layers", ())))

    @property
    def spec(self) -> StreamSpec:
        """The stream as an input of the model; log-Mel is an audio stream."""
        kind = VISUAL if self.kind == "visual" else AUDIO
        return StreamSpec(self.name, kind, self.dim, self.frames_per_step, self.layers)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        text: stream of prototypes, "" for none; prototypes: the embeddings [9, D].
        descriptions: descriptions of the nine regions, if the cache has them; text_identity: of the text tower.
        targets: further targets of the model.
    """

    streams: tuple[InputStream, ...]
    text: str = ""
    prototypes: Tensor | None = None
    descriptions: tuple[str, ...] = ()
    text_identity: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[TargetSpec, ...] = ()

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        """The input streams of the model."""
        return tuple(stream.spec for stream in self.streams)


def resolve(cache: Cache, config: TrainConfig) -> tuple[TrainConfig, Inputs]:
    """Fill in unset settings (streams, windows, prototypes) from the cache.

    Raises:
        UsageError: a stream or prompt set does not exist, is of another kind, or is ambiguous.
    """
    known = cache.streams()
    visual = _choose(cache, known, VISUAL, config.visual)
    audio = _choose(cache, known, AUDIO, config.audio)
    if not visual and not audio:
        kinds = sorted({info.kind for info in known.values()})
        problem = f"{cache.place} has nothing to train on"
        extraction = command("extract", "DATA", "--out", cache.place)
        remedy = f"Fill it with `{extraction}`, or name a stream with --visual or --audio"
        got = ", ".join(kinds) or "no streams"
        raise UsageError(explain(problem, expected="a visual or audio stream", got=got, remedy=remedy))
    config = replace(
        with_folds(config),
        fold_groups=absolute_groups(config.fold_groups),
        visual=tuple(info.name for info in visual) or (NONE,),
        audio=tuple(info.name for info in audio) or (NONE,),
    )
    config = _with_windows(cache, config, [*visual, *audio])
    constant = [info.name for info in (*visual, *audio) if info.dim == 1 and info.kind != LOGMEL]
    if config.normalize == "layer" and constant:
        problem = f"normalize=layer makes every value of {constant[0]} equal: the stream has one dimension"
        raise UsageError(explain(problem, remedy="Use --set normalize=standard"))
    streams = tuple(_input_stream(cache, info, config) for info in (*visual, *audio))
    text = _text_stream(cache, known, config) if config.kl_weight else ""
    config = replace(config, text=text)
    targets = target_specs(cache, config.extra_targets)
    if not text:
        return config, Inputs(streams, targets=targets)
    sets = cache.items(stream=text)
    if config.prompts not in sets:
        problem = f"Stream {text!r} of {cache.place} has no prompt set {config.prompts!r}"
        raise UsageError(explain(problem, got=config.prompts, choices=sets))
    prototypes = torch.from_numpy(cache.read(text, config.prompts, ["embedding"]).embedding.copy()).float()
    prompts = cache.record(text, config.prompts).source.get("prompts") or {}
    descriptions = tuple(prompts.get("descriptions", ()))
    return config, Inputs(streams, text, prototypes, descriptions, known[text].identity, targets)


def _choose(cache: Cache, known: Mapping[str, StreamInfo], modality: str, names: Sequence[str]) -> list[StreamInfo]:
    """The streams of a modality that `names` selects; by default, the only one or the paper's."""
    if tuple(names) == (NONE,):
        return []
    kinds = (modality, LOGMEL) if modality == AUDIO else (modality,)
    choices = {name: info for name, info in known.items() if info.kind in kinds}
    for name in names:
        if name not in choices:
            remedy = None
            if is_encoder(name, modality) or name == LOGMEL:
                other = AUDIO if modality == VISUAL else VISUAL
                options = (f"--{modality}", name, f"--{other}", "none")
                remedy = f"Add it to the cache: {command('extract', 'ROOT', '--out', cache.place, *options)}"
            kind = f"; it is a {known[name].kind} stream" if name in known else ""
            problem = f"{cache.place} has no {modality} stream {name!r}{kind}"
            raise UsageError(explain(problem, got=name, choices=choices, remedy=remedy))
    if names:
        return [choices[name] for name in names]
    defaults = [info for info in choices.values() if info.kind == modality]
    if len(defaults) > 1 and PREFERRED[modality] in choices:
        log.info("Using %s of several %s streams; --%s selects another", PREFERRED[modality], modality, modality)
        return [choices[PREFERRED[modality]]]
    if len(defaults) > 1:
        problem = f"{cache.place} has several {modality} streams"
        remedy = f"Select one with --{modality} NAME"
        raise UsageError(explain(problem, choices=[info.name for info in defaults], remedy=remedy))
    return defaults


def _with_windows(cache: Cache, config: TrainConfig, infos: Sequence[StreamInfo]) -> TrainConfig:
    """Fill in window, stride and frames from the extraction, the rate of imported features, or the defaults."""
    grid = Grid()
    default: dict[str, float] = {"window": grid.window, "stride": grid.stride, "frames": grid.frames}
    for info in reversed(infos):
        default |= {key: value for key, value in sampling(info.identity).items() if key in default}
    chosen = {key: getattr(config, key) for key in default if getattr(config, key) is not None}
    if not any(sampling(info.identity) for info in infos) and "window" not in chosen:
        interval = max(_measured_interval(cache, info) for info in infos)
        if interval > grid.step * 1.01:
            frames = chosen.get("frames", SLOW_FRAMES)
            window = round(frames * interval, 3)
            default = {"window": window, "stride": round(min(SLOW_STRIDE, frames) * interval, 3), "frames": frames}
            log.info("Windows of %d rows (%g s): the features have a row every %.3g s", frames, window, interval)
    if "window" in chosen and "frames" not in chosen:  # keep the cached sample times
        chosen["frames"] = max(1, round(default["frames"] * chosen["window"] / default["window"]))
    if "window" in chosen and "stride" not in chosen:
        chosen["stride"] = min(default["stride"], chosen["window"])
    both = {**default, **chosen}
    return replace(config, window=float(both["window"]), stride=float(both["stride"]), frames=int(both["frames"]))


def sampling(identity: Mapping[str, Any]) -> dict[str, float]:
    """Sampling of a stream (`window`, `stride`, `frames`, `audio_steps`), as far as its identity states it."""
    stated = identity.get("sampling")
    if not isinstance(stated, Mapping):
        return {}
    return {key: value for key, value in stated.items() if isinstance(value, int | float) and value > 0}


def interval_of(kind: str, identity: Mapping[str, Any]) -> float | None:
    """Seconds between two samples of a stream; None if its identity does not state it."""
    if kind == LOGMEL:
        return LOGMEL_INTERVAL
    stated = sampling(identity)
    count = stated.get("frames" if kind == VISUAL else "audio_steps")
    return stated["window"] / count if count and "window" in stated else None


def _input_stream(cache: Cache, info: StreamInfo, config: TrainConfig) -> InputStream:
    """A stream with its vectors per window: the frames of a visual stream, the steps of an audio stream."""
    grid, interval = config.grid, interval_of(info.kind, info.identity)
    frames_per_step, steps = 0, int(grid.frames)
    if info.kind == VISUAL and interval and grid.step < interval / 2:
        log.info("%s: a sample every %.3g s for a frame every %.3g s: neighbours share", info.name, interval, grid.step)
    if info.kind == LOGMEL:
        frames_per_step = max(1, round(grid.window / (config.audio_steps or steps) / LOGMEL_INTERVAL))
        steps = (config.audio_steps or steps) * frames_per_step
    elif info.kind != VISUAL:
        interval = interval or _measured_interval(cache, info)
        steps = config.audio_steps or max(1, round(grid.window / interval))
    return InputStream(info.name, info.kind, _width(info), steps, fingerprint(info), info.identity, frames_per_step)


def _width(info: StreamInfo) -> int:
    """Width of a row: all stored layers end to end."""
    return info.dim * max(1, stored_layers(info))


def _measured_interval(cache: Cache, info: StreamInfo) -> float:
    """Seconds between the rows of a stream that states no sampling, from its first clip with two rows."""
    if info.kind == LOGMEL:
        return LOGMEL_INTERVAL
    for item in cache.items(stream=info.name):
        time = cache.read(info.name, item, ["time"]).time
        row = time if info.kind == VISUAL else time[:1].ravel()
        if row.size > 1:
            return median_interval(row)
    return Grid().step


def _text_stream(cache: Cache, known: Mapping[str, StreamInfo], config: TrainConfig) -> str:
    """The stream of prototypes: the named one, the one of the first visual stream, or any; "" without prototypes."""
    text = {name for name, info in known.items() if info.kind == "text"}
    if config.text:
        if config.text not in text:
            raise UsageError(explain(f"{cache.place} has no such stream of prototypes", got=config.text, choices=text))
        return config.text
    if text:
        return next((name for name in (f"{visual}.text" for visual in config.visual) if name in text), min(text))
    _warn_of_no_prompts(str(cache.place))
    return ""


@lru_cache
def _warn_of_no_prompts(cache: str) -> None:
    """Warn once per process: a study resolves its settings for every run."""
    log.warning(
        "%s has no prompt embeddings: the prompt head is left out. To add them, run `vaflow extract` with a CLIP "
        "encoder; to train without a prompt head, pass --kl-weight 0.",
        cache,
    )


def check_same(streams: Iterable[InputStream], cache: Cache) -> None:
    """Check that a run's streams in this cache come from the same encoder with the same settings.

    The sampling, the decoder, the choice of a person, the stored dtype and the encoders' precision can differ; that is
    logged, all but the precision once per process, because `predict` makes a cache per clip.

    Raises:
        UsageError: the cache has no such stream.
        FingerprintError: a stream was made with other settings; every differing field is named.
    """
    known, allowed = cache.streams(), dict[str, str]()
    for stream in streams:
        if stream.name not in known:
            problem = f"{cache.place} has no stream {stream.name!r}, which the run reads"
            raise UsageError(explain(problem, got=stream.name, choices=known))
        info = known[stream.name]
        if fingerprint(info) == stream.fingerprint:
            continue
        fields = _differing_fields(stream, info)
        hard = [text for key, text in fields.items() if not f"{key}.".startswith(tuple(f"{k}." for k in _LENIENT))]
        if not fields:
            fields = {"dtype": f"dtype: {info.dtype}, another dtype in the run"}
        if hard:
            problem = f"Stream {stream.name!r} of {cache.place} was made with other settings than the run's"
            expected = "the encoder that the run was trained on"
            remedy = "Extract the clips again with the run's encoder and weights"
            raise FingerprintError(explain(problem, expected=expected, got="; ".join(hard), remedy=remedy))
        allowed |= {key.removeprefix("picture."): text.removeprefix("picture.") for key, text in fields.items()}
    if allowed:
        if "precision" in allowed:
            differences = "; ".join(allowed.values())
            log.warning("The features differ from those of the run's training cache in %s", differences)
        else:
            _log_differences(tuple(allowed.items()))


def check_same_targets(targets: Iterable[TargetSpec], cache: Cache) -> None:
    """Check that a run's further targets have the same classes or units in this cache, in the same order.

    Raises:
        FingerprintError: they differ.
    """
    for spec in targets:
        if spec.name not in cache.streams():
            continue
        (present,) = target_specs(cache, [spec.name])
        if present != spec:
            problem = f"Targets {spec.name!r} of {cache.place} are not those that the run was trained on"
            expected, got = (f"{one.task}: {', '.join(one.names)}" for one in (spec, present))
            raise FingerprintError(explain(problem, expected=expected, got=got))


@lru_cache
def _log_differences(fields: tuple[tuple[str, str], ...]) -> None:
    """Log the fields that differ, none of which has a visible effect, and, unless they are many, their values."""
    texts = dict(fields)
    if texts.keys() == {"decoder.reading"}:
        log.info("The run was trained on features of another version of vaflow; predictions can differ slightly")
        return
    names = sorted({".".join(key.split(".")[:2]) for key in texts})
    differences = "; ".join(texts.values()) if len(texts) <= 2 else ", ".join(names)
    log.info("The features differ from those of the run's training cache in %s", differences)
    log.debug("In this cache, and in the run: %s", "; ".join(texts.values()))


def _differing_fields(stream: InputStream, info: StreamInfo) -> dict[str, str]:
    """Field -> `field: in the cache, in the run`; fields of nested settings have dotted names."""
    cached = _flat({"kind": info.kind, "dim": _width(info), **info.identity})
    trained = _flat({"kind": stream.kind, "dim": stream.dim, **stream.identity})
    # Audio features record the dtype of the log-Mel that they were made from; the dtype alone is no other encoder.
    logmels = [settings.get("sound") for settings in (cached, trained)]
    if all(isinstance(value, str) and value.startswith(f"{LOGMEL} ") for value in logmels):
        cached.pop("sound")
        trained.pop("sound")
    pairs = {key: (cached.get(key), trained.get(key)) for key in sorted({*cached, *trained})}
    return {key: f"{key}: {a!r}, {b!r} in the run" for key, (a, b) in pairs.items() if a != b}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True)
class InputMasks:
    """Valid inputs that a run masks.

    Attributes:
        min_face_quality: faces below this quality count as missing.
        speech: audio without speech counts as missing.
    """

    min_face_quality: float = 0.0
    speech: bool = False

    def valid(self, cache: Cache, stream: str, kind: str, data: Item) -> np.ndarray:
        """`data.valid` of an item of a stream, without what is left out.

        Raises:
            UsageError: the cache does not hold what a setting requires.
        """
        if kind == "visual" and self.min_face_quality > 0:
            quality = face_quality(cache, stream, data.item, data)
            if quality is None:
                problem = f"min_face_quality requires face quality; {cache.place} has none for clip {data.item!r}"
                expected = "features of detected faces, extracted with --person main"
                remedy = "Extract the videos with --person main into a new cache, or leave min_face_quality out"
                raise UsageError(explain(problem, expected=expected, remedy=remedy))
            return data.valid & (quality >= self.min_face_quality)
        if kind != "visual" and self.speech:
            speech = speech_activity(cache, data.item)
            if speech is None:
                problem = f"speech_mask requires speech activity; {cache.place} has none for clip {data.item!r}"
                remedy = "Extract the videos into a new cache, or leave speech_mask out"
                raise UsageError(explain(problem, expected="log-Mel with speech activity", remedy=remedy))
            if kind == LOGMEL:
                return data.valid & speech[: len(data.valid)]
            return data.valid & during_speech(speech, data.time, median_interval(data.time[:1].ravel()))
        return data.valid


def face_quality(cache: Cache, stream: str, item: str, data: Item) -> Floats | None:
    """Quality of the face at each visual sample, [T], 0 (no face) to 1; None if the cache does not hold it.

    The product of the detector's score, the cosine of the yaw, and size and sharpness as shares of a good face's.

    Args:
        data: the item of the visual stream, with its array `frame`.
    """
    person = cache.record(stream, item).meta.get("person")
    frame = data.arrays.get("frame")
    if not isinstance(person, int) or frame is None or FACES not in cache.streams() or not cache.has(FACES, item):
        return None
    faces = cache.read(FACES, item, ["frame", "person", "size", "sharpness", "yaw", "score"])
    mine = np.flatnonzero(faces.person == person)
    value = (
        faces.score
        * np.minimum(faces.size / GOOD_SIZE, 1)
        * np.minimum(faces.sharpness / GOOD_SHARPNESS, 1)
        * np.maximum(np.cos(np.radians(faces.yaw)), 0)
    )[mine]
    quality = np.zeros(len(frame))
    if len(mine):
        place = np.minimum(np.searchsorted(faces.frame[mine], frame), len(mine) - 1)
        same = faces.frame[mine][place] == frame
        quality[same] = value[place][same]
    return quality


def speech_activity(cache: Cache, item: str) -> Bools | None:
    """[F] True where there is speech, one per `LOGMEL_INTERVAL` seconds from 0; None if the cache does not hold it."""
    if LOGMEL not in cache.streams() or not cache.has(LOGMEL, item):
        return None
    if "speech" not in cache.record(LOGMEL, item).arrays:
        return None
    speech: Bools = cache.read(LOGMEL, item, ["speech"]).arrays["speech"]
    return speech


def during_speech(speech: Bools, time: np.ndarray, length: float) -> Bools:
    """True where at least half of `length` seconds around each time is speech."""
    sums = np.concatenate([[0], np.cumsum(speech)])
    first, last = (
        np.clip(np.rint((time + sign * length / 2) / LOGMEL_INTERVAL).astype(np.int64), 0, len(speech))
        for sign in (-1, 1)
    )
    result: Bools = 2 * (sums[last] - sums[first]) >= max(round(length / LOGMEL_INTERVAL), 1)
    return result
