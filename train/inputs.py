"""Inputs of a run: streams and prototypes of the cache, chosen by the settings or, by default, from the cache."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vaflow.cache import Cache
from vaflow.cache.documents import fingerprint
from vaflow.cache.schema import LOGMEL, StreamInfo, stored_layers
from vaflow.encoders import is_encoder
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.timeline import Grid, median_interval
from vaflow.train.batch import AUDIO, VISUAL, StreamSpec, TargetSpec
from vaflow.train.config import NONE, TrainConfig
from vaflow.train.folds import with_folds
from vaflow.train.targets import target_specs

log = logging.getLogger(__name__)

PREFERRED = {VISUAL: "clip-vit-b16", AUDIO: "ast"}  # if a cache has several: the paper's streams
LOGMEL_INTERVAL = 0.01  # seconds between filter-bank frames
# Settings that may differ between the cache of the training and one to predict: they move samples or change low bits.
_LENIENT = ("sampling", "decoder", "picture.decoder", "picture.faces.runtime", "precision")
SLOW_FRAMES, SLOW_STRIDE = 20, 6  # rows of a window, and between two windows, of features slower than the default


@dataclass(frozen=True)
class InputStream:
    """A stream that a run reads.

    Attributes:
        name: of the stream; dim: width of a row, over all layers where several are stored.
        kind: of the cache: "visual", "audio" or "logmel".
        steps: vectors per training window; for visual streams, the frames.
        frames_per_step: of log-Mel, how many of them a CNN makes one audio step of; 0: vectors are steps.
        identity: what made it; fingerprint: its digest.
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
        """Number of the encoder's layers in a row; 1: one vector."""
        return max(1, len(self.identity.get("layers", ())))

    @property
    def spec(self) -> StreamSpec:
        """The stream as a model's input; log-Mel is an audio stream."""
        kind = VISUAL if self.kind == "visual" else AUDIO
        return StreamSpec(self.name, kind, self.dim, self.frames_per_step, self.layers)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        streams: of features.
        text: the stream of prototypes, "" for none; prototypes: the embeddings [9, D].
        descriptions: the words of the nine regions, if the cache has them; text_identity: of the text tower.
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
        """The streams as a model's inputs."""
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
        remedy = f"Fill it with `vaflow extract DATA --out {cache.place}`, or name a stream with --visual or --audio"
        got = ", ".join(kinds) or "no streams"
        raise UsageError(explain(problem, expected="a visual or audio stream", got=got, remedy=remedy))
    config = replace(
        with_folds(config),
        visual=tuple(info.name for info in visual) or (NONE,),
        audio=tuple(info.name for info in audio) or (NONE,),
    )
    config = _with_windows(cache, config, [*visual, *audio])
    constant = [info.name for info in (*visual, *audio) if info.dim == 1 and info.kind != LOGMEL]
    if config.normalize == "layer" and constant:
        raise UsageError(
            explain(
                f"normalize=layer makes every value of {constant[0]} equal: the stream has one dimension",
                remedy="Use --set normalize=standard",
            )
        )
    streams = [_visual_input(info, config.grid) for info in visual]
    streams += [_audio_input(cache, info, config) for info in audio]
    text = _text_stream(cache, known, config) if config.kl_weight else ""
    config = replace(config, text=text)
    targets = target_specs(cache, config.extra_targets)
    if not text:
        return config, Inputs(tuple(streams), targets=targets)
    prototypes = _prototypes(cache, text, config.prompts)
    words = cache.record(text, config.prompts).source.get("prompts", {}).get("descriptions", ())
    return config, Inputs(tuple(streams), text, prototypes, tuple(words), known[text].identity, targets)


def _choose(cache: Cache, known: Mapping[str, StreamInfo], modality: str, names: Sequence[str]) -> list[StreamInfo]:
    if tuple(names) == (NONE,):
        return []
    kinds = (modality, LOGMEL) if modality == AUDIO else (modality,)
    fitting = {name: info for name, info in known.items() if info.kind in kinds}
    for name in names:
        if name not in fitting:
            kind = f"; it is a {known[name].kind} stream" if name in known else ""
            raise UsageError(
                explain(
                    f"{cache.place} has no {modality} stream {name!r}{kind}",
                    got=name,
                    choices=fitting,
                    remedy=_how_to_add(cache, modality, name),
                )
            )
    if names:
        return [fitting[name] for name in names]
    own = [info for info in fitting.values() if info.kind == modality]
    if len(own) > 1 and PREFERRED[modality] in fitting:
        log.info("Of several %s streams, %s is used; --%s chooses another", modality, PREFERRED[modality], modality)
        return [fitting[PREFERRED[modality]]]
    if len(own) > 1:
        raise UsageError(
            explain(
                f"{cache.place} has several {modality} streams",
                expected=f"--{modality} NAME",
                got="no choice",
                choices=[info.name for info in own],
            )
        )
    return own


def _how_to_add(cache: Cache, modality: str, name: str) -> str | None:
    """The command that adds a stream of that name; None if no encoder of the modality makes it."""
    other = AUDIO if modality == VISUAL else VISUAL
    command = f"`vaflow extract ROOT --out {cache.place} --{modality} {name} --{other} none`"
    return f"{command} adds it, and encodes nothing else anew" if is_encoder(name, modality) or name == LOGMEL else None


def _with_windows(cache: Cache, config: TrainConfig, infos: Sequence[StreamInfo]) -> TrainConfig:
    """Fill in window, stride and frames: from the extraction, the rate of imported features, or the grid's defaults."""
    grid = Grid()
    default: dict[str, float] = {"window": grid.window, "stride": grid.stride, "frames": grid.frames}
    for info in reversed(infos):
        default |= {key: value for key, value in sampling(info.identity).items() if key in default}
    given = {key: getattr(config, key) for key in default if getattr(config, key) is not None}
    if not any(sampling(info.identity) for info in infos) and "window" not in given:
        interval = max(_measured_interval(cache, info) for info in infos)
        if interval > grid.step * 1.01:
            frames = given.get("frames", SLOW_FRAMES)
            window = round(frames * interval, 3)
            default = {"window": window, "stride": round(min(SLOW_STRIDE, frames) * interval, 3), "frames": frames}
            log.info("Windows of %d rows (%g s): the features have a row every %.3g s", frames, window, interval)
    if "window" in given and "frames" not in given:  # keep the samples where they are cached
        given["frames"] = max(1, round(default["frames"] * given["window"] / default["window"]))
    if "window" in given and "stride" not in given:
        given["stride"] = min(default["stride"], given["window"])
    both = {**default, **given}
    return replace(config, window=float(both["window"]), stride=float(both["stride"]), frames=int(both["frames"]))


def sampling(identity: Mapping[str, Any]) -> dict[str, float]:
    """Sampling of a stream (`window`, `stride`, `frames`, `audio_steps`), as far as its identity states it."""
    said = identity.get("sampling")
    if not isinstance(said, Mapping):
        return {}
    return {key: value for key, value in said.items() if isinstance(value, int | float) and value > 0}


def interval_of(kind: str, identity: Mapping[str, Any]) -> float | None:
    """Seconds between two samples of a stream; None if its identity does not state it."""
    if kind == LOGMEL:
        return LOGMEL_INTERVAL
    said = sampling(identity)
    count = said.get("frames" if kind == VISUAL else "audio_steps")
    return said["window"] / count if count and "window" in said else None


def _visual_input(info: StreamInfo, grid: Grid) -> InputStream:
    cached = interval_of(info.kind, info.identity)
    if cached and grid.step < cached / 2:
        log.info("%s: a sample every %.3g s for a frame every %.3g s: neighbours share", info.name, cached, grid.step)
    return InputStream(info.name, info.kind, _width(info), int(grid.frames), fingerprint(info), info.identity)


def _audio_input(cache: Cache, info: StreamInfo, config: TrainConfig) -> InputStream:
    window = config.grid.window
    if info.kind == LOGMEL:
        steps = config.audio_steps or int(config.grid.frames)
        each = max(1, round(window / steps / LOGMEL_INTERVAL))
        return InputStream(info.name, info.kind, info.dim, steps * each, fingerprint(info), info.identity, each)
    interval = interval_of(info.kind, info.identity) or _measured_interval(cache, info)
    steps = config.audio_steps or max(1, round(window / interval))
    return InputStream(info.name, info.kind, _width(info), steps, fingerprint(info), info.identity)


def _width(info: StreamInfo) -> int:
    """Return the width of a row: all stored layers laid end to end."""
    return info.dim * max(1, stored_layers(info))


def _measured_interval(cache: Cache, info: StreamInfo) -> float:
    """Seconds between the rows of a stream without stated sampling, from its first clip with two rows."""
    if info.kind == LOGMEL:
        return LOGMEL_INTERVAL
    for item in cache.items(stream=info.name):
        time = cache.read(info.name, item, ["time"]).time
        row = time if info.kind == VISUAL else time[:1].ravel()
        if row.size > 1:
            return median_interval(row)
    return Grid().step


def _text_stream(cache: Cache, known: Mapping[str, StreamInfo], config: TrainConfig) -> str:
    """The stream of prototypes: the named one, that of the first visual stream, or any; "" if there is none."""
    text = {name for name, info in known.items() if info.kind == "text"}
    if config.text:
        if config.text not in text:
            raise UsageError(explain("The cache has no such stream of prototypes", got=config.text, choices=text))
        return config.text
    own = [name for name in (f"{visual}.text" for visual in config.visual) if name in text]
    if own or text:
        return own[0] if own else min(text)
    _warn_of_no_prompts(str(cache.place))
    return ""


@lru_cache
def _warn_of_no_prompts(cache: str) -> None:
    """Warn once per process: a study resolves its settings for every run."""
    log.warning(
        "%s has no prompt embeddings: the prompt head is left out. Add them with `vaflow extract` and a CLIP encoder, "
        "or pass --kl-weight 0.",
        cache,
    )


def _prototypes(cache: Cache, text: str, prompts: str) -> Tensor:
    sets = cache.items(stream=text)
    if prompts not in sets:
        raise UsageError(explain(f"Stream {text!r} of {cache.place} has no such prompt set", got=prompts, choices=sets))
    return torch.from_numpy(cache.read(text, prompts, ["embedding"]).embedding.copy()).float()


def check_same(streams: Iterable[InputStream], cache: Cache) -> None:
    """Check that a run's streams are those of this cache: made by the same encoder with the same settings.

    The sampling, the decoder, the stored dtype and the encoders' precision may differ; the log names them.

    Raises:
        UsageError: the cache has no such stream.
        FingerprintError: it was made with other settings; every differing field is named.
    """
    known = cache.streams()
    for stream in streams:
        if stream.name not in known:
            raise UsageError(explain(f"{cache.place} lacks a stream of this run", got=stream.name, choices=known))
        info = known[stream.name]
        if fingerprint(info) == stream.fingerprint:
            continue
        fields = _different(stream, info)
        hard = [text for key, text in fields.items() if not f"{key}.".startswith(tuple(f"{k}." for k in _LENIENT))]
        if not fields:
            fields = {"dtype": f"dtype: {info.dtype}, another one in the run"}
        if hard:
            raise FingerprintError(
                explain(
                    f"Stream {stream.name!r} of {cache.place} was made with other settings than the run's",
                    expected="the encoder that the run was trained on",
                    got="; ".join(hard),
                    remedy="Extract the clips again with the run's encoder and weights",
                )
            )
        level = logging.WARNING if "precision" in fields else logging.INFO  # the others have no visible effect
        differs = "; ".join(fields.values())
        log.log(level, "%s: %s differs from the training cache: %s", cache.place, stream.name, differs)


def _different(stream: InputStream, info: StreamInfo) -> dict[str, str]:
    """Field -> `field: in the cache, in the run`; fields of nested settings have dotted names.

    Audio features say in which dtype the log-Mel under them is stored; that alone is no other encoder.
    """
    there = _flat({"kind": info.kind, "dim": _width(info), **info.identity})
    here = _flat({"kind": stream.kind, "dim": stream.dim, **stream.identity})
    stored = [settings.get("sound") for settings in (there, here)]
    if all(isinstance(value, str) and value.startswith(f"{LOGMEL} ") for value in stored):
        there.pop("sound")
        here.pop("sound")
    pairs = {key: (there.get(key), here.get(key)) for key in sorted({*there, *here})}
    return {key: f"{key}: {a!r}, {b!r} in the run" for key, (a, b) in pairs.items() if a != b}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
