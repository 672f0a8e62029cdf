"""The encoders, by name. Names and kinds are known without torch; building an encoder imports what it needs.

A fixed name is a key of `ENCODERS`; `FAMILY:SOURCE` names other weights of a family, as `FORMS` lists; `@LAYER` chooses
layers of a transformer. Names in a run or a cache use the same table: a name selects a builder of this package and data
for it, never code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vaflow.device import forbid_tf32
from vaflow.encoders.base import Request, split_layers
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vaflow.encoders.base import AudioEncoder, VisualEncoder
    from vaflow.encoders.clip import ContextTower

log = logging.getLogger(__name__)

EncoderKind = Literal["visual", "audio", "logmel", "any"]  # any: the model decides
TINY = "-tiny"  # ends the names of encoders with seeded random weights, whose results demonstrate the software only
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Entry:
    """A fixed name: the kind of encoder, and its family and source."""

    kind: EncoderKind
    family: str
    source: str = ""


# fmt: off
ENCODERS: Mapping[str, Entry] = {
    "clip-vit-b16": Entry("visual", "clip", "ViT-B-16-quickgelu/openai"),
    "clip-vit-b32": Entry("visual", "clip", "ViT-B-32-quickgelu/openai"),
    "clip-tiny":    Entry("visual", "tiny", "clip"),    # the tiny ones: same classes, seeded weights, no download
    "resnet50":     Entry("visual", "resnet"),          # ImageNet
    "resnet-tiny":  Entry("visual", "tiny", "resnet"),
    "ast":          Entry("audio", "ast", "MIT/ast-finetuned-audioset-10-10-0.4593"),
    "ast-tiny":     Entry("audio", "tiny", "ast"),
    "vggish":       Entry("audio", "vggish"),           # YouTube-8M's precursor
    "vggish-tiny":  Entry("audio", "tiny", "vggish"),
    "resemblyzer":  Entry("audio", "resemblyzer"),      # a speaker encoder; needs local weights
    "logmel":       Entry("logmel", "logmel"),
}

FORMS: Mapping[str, tuple[EncoderKind, str]] = {
    "clip": ("visual", "clip:MODEL/TAG_OR_FILE[@LAYER]"),
    "ast":  ("audio", "ast:PATH_OR_HUB_ID[@LAYER]"),
    "hf":   ("any", "hf:REPO_OR_PATH[@LAYER]"),
    "timm": ("visual", "timm:MODEL[/FILE][@LAYER]"),
    "onnx": ("any", "onnx:FILE"),
    "opensmile": ("audio", "opensmile:eGeMAPSv02[/functionals]"),
}
# fmt: on
BUILDERS = {
    "clip": "clip.build",
    "ast": "ast.build",
    "hf": "huggingface.build",
    "onnx": "onnx_models.build",
    "timm": "image_models.build_timm",
    "resnet": "image_models.build_resnet",
    "vggish": "vggish.build",
    "opensmile": "audio_models.build_opensmile",
    "resemblyzer": "audio_models.build_resemblyzer",
    "tiny": "tiny.build",
}
WITHOUT_LAYERS = ("resnet", "vggish", "resemblyzer", "onnx", "opensmile", "logmel")


def encoder_kind(name: str) -> EncoderKind:
    """Return an encoder's input: "visual", "audio" or "logmel"; "any" if the model decides. Imports nothing heavy.

    Raises:
        UsageError: no encoder has that name; the choices are listed.
    """
    return _entry(name).kind


def is_encoder(name: str, kind: str) -> bool:
    """Return whether a name can be an encoder of a kind. Imports nothing heavy."""
    try:
        return encoder_kind(name) in (kind, "any")
    except UsageError:
        return False


def build_encoder(
    name: str, *, weights: Path | None = None, device: str = "cpu", precision: str = "auto", kind: str = ""
) -> VisualEncoder | AudioEncoder:
    """Return an encoder in evaluation mode.

    Args:
        name: a key of `ENCODERS`, or one of the `FORMS`.
        weights: local weights to use instead of the published ones: a file (a folder for AST).
        device: "cpu", "cuda" or "cuda:N".
        precision: "auto" is float32 on every device, so that a cache depends on the device by rounding only;
            "bfloat16" and, on CUDA, "float16" run the network in autocast and become part of the identity.
        kind: "visual" or "audio": refuse a model of the other kind, for names whose model decides.

    Raises:
        UsageError: the name, the precision or the combination is wrong.
        WeightsError: weights are missing, unreachable, or do not fit.
    """
    entry = _entry(name)
    if precision not in PRECISIONS:
        raise UsageError(explain("Unknown precision", got=precision, choices=PRECISIONS))
    if precision == "float16" and not device.startswith("cuda"):
        problem = "float16 requires a CUDA device"
        raise UsageError(explain(problem, choices=["float32", "bfloat16"], got=f"{precision} on {device}"))
    resolved = "float32" if precision == "auto" else precision
    if resolved == "float32" and device.startswith("cuda"):
        forbid_tf32()
    base, choice = split_layers(name, name)
    without = entry.family in WITHOUT_LAYERS or (
        entry.family == "tiny" and not entry.source.startswith(("clip", "ast"))
    )
    if without and base != name and not Path(entry.source).exists():
        expected = "layers of a transformer: a name that begins with hf:, clip, ast or timm:"
        raise UsageError(explain(f"{base} has no layers to choose", expected=expected, got=f"@{choice.layers}"))
    return _builder(entry.family)(Request(name, entry.source, weights, device, resolved, kind))


def encode_text(encoder: VisualEncoder | AudioEncoder, texts: list[str]) -> NDArray[np.float32]:
    """Return [N, D] float32 for N texts, each of length one, in the space of the encoder's images.

    Raises:
        UsageError: the encoder has no text tower.
    """
    result: NDArray[np.float32] = _text_tower(encoder, "encode_text")(texts)
    return result


def context_tower(encoder: VisualEncoder | AudioEncoder, texts: Sequence[str], count: int) -> ContextTower:
    """Return the text tower of an encoder with `count` learned vectors before each text; the encoder is frozen.

    Raises:
        UsageError: the encoder has no text tower, or one that does not support vectors.
    """
    tower: ContextTower = _text_tower(encoder, "context_tower")(texts, count)
    return tower


def _text_tower(encoder: VisualEncoder | AudioEncoder, method: str) -> Any:
    """Return a method of an encoder's text tower; refuse encoders without it."""
    if not hasattr(encoder, method):
        raise UsageError(explain(f"{encoder.name} has no text tower", expected="a CLIP encoder"))
    return getattr(encoder, method)


def _entry(name: str) -> Entry:
    base, _ = split_layers(name, name)
    if base in ENCODERS:
        fixed = ENCODERS[base]
        return replace(fixed, source=fixed.source + name.removeprefix(base))
    family, colon, source = name.partition(":")
    if colon and source and family not in FORMS and family in {point.name for point in _plugins()}:
        return Entry("any", family, source)
    if family not in FORMS or not colon:
        problem = "Unknown encoder"
        raise UsageError(explain(problem, got=name, choices=[*ENCODERS, *(form for _, form in FORMS.values())]))
    kind, form = FORMS[family]
    model, _, rest = source.partition("/")
    if not source or (family == "clip" and not (model and rest)):
        raise UsageError(explain("The encoder's name is incomplete", expected=form, got=name))
    return Entry(kind, family, source)


def _plugins() -> EntryPoints:
    """Return the families of other packages: entry points whose object has `build(request)`."""
    return entry_points(group="vaflow.encoders")


def _builder(family: str) -> Callable[[Request], VisualEncoder | AudioEncoder]:
    """Return the function that builds the encoders of a family; `BUILDERS` names those of this package."""
    if family in BUILDERS:
        module, _, function = BUILDERS[family].partition(".")
        build: Callable[[Request], VisualEncoder | AudioEncoder]
        build = getattr(import_module(f"vaflow.encoders.{module}"), function)
        return build
    for point in _plugins():  # installed by the user: a name selects one, it installs and imports nothing else
        if point.name == family:
            build = point.load().build
            return build
    problem = "logmel has no network to build: its filter banks are stored for every clip with audio"
    raise UsageError(explain(problem, remedy="Use vaflow.encoders.logmel.FilterBank"))


def random_encoders(streams: Iterable[str]) -> list[str]:
    """The streams whose encoders have seeded random weights, each once."""
    return list(dict.fromkeys(name for name in streams if name.endswith(TINY)))


def demonstration_notice(streams: Iterable[str]) -> str:
    """One line for pictures and logs about encoders with random weights; empty if none has."""
    names = random_encoders(streams)
    return f"Demonstration: encoders with seeded random weights ({', '.join(names)})" if names else ""


def warn_of_demonstration(streams: Iterable[str]) -> None:
    """Log that encoders with random weights are used, if they are."""
    notice = demonstration_notice(streams)
    if notice:
        log.warning("%s", notice)
