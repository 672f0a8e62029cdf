"""The encoders, by name. Names and kinds are listed without torch; building one imports what it needs.

A fixed name is a key of `ENCODERS`; `clip:MODEL/TAG_OR_FILE` and `ast:PATH_OR_HUB_ID` name any other weights of the two
families in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vaflow.device import forbid_tf32
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vaflow.encoders.base import AudioEncoder, VisualEncoder

EncoderKind = Literal["visual", "audio", "logmel"]
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What a builder is asked for: the name as typed, local weights if any, the device, the precision."""

    name: str
    weights: Path | None
    device: str
    precision: str

    def refuse_weights(self, why: str) -> None:
        """Raise a UsageError if local weights were given to an encoder that cannot take them."""
        if self.weights is not None:
            raise UsageError(explain(f"{self.name} takes no --weights: {why}", got=self.weights))


@dataclass(frozen=True)
class Entry:
    """An encoder's kind, and what builds it (imports happen inside)."""

    kind: EncoderKind
    build: Callable[[Request], VisualEncoder | AudioEncoder]


def _clip_b16(request: Request) -> VisualEncoder:
    from vaflow.encoders import clip

    return clip.build_openai(request, "ViT-B-16-quickgelu")


def _clip_b32(request: Request) -> VisualEncoder:
    from vaflow.encoders import clip

    return clip.build_openai(request, "ViT-B-32-quickgelu")


def _clip_tiny(request: Request) -> VisualEncoder:
    from vaflow.encoders import tiny

    return tiny.build_clip(request)


def _ast(request: Request) -> AudioEncoder:
    from vaflow.encoders import ast

    return ast.build_default(request)


def _ast_tiny(request: Request) -> AudioEncoder:
    from vaflow.encoders import tiny

    return tiny.build_ast(request)


def _resnet50(request: Request) -> VisualEncoder:
    from vaflow.encoders import resnet

    return resnet.build_resnet50(request)


def _resnet_tiny(request: Request) -> VisualEncoder:
    from vaflow.encoders import tiny as tiny_cnn

    return tiny_cnn.build_resnet(request)


def _vggish(request: Request) -> AudioEncoder:
    from vaflow.encoders import vggish

    return vggish.build_vggish(request)


def _vggish_tiny(request: Request) -> AudioEncoder:
    from vaflow.encoders import tiny as tiny_cnn

    return tiny_cnn.build_vggish(request)


def _any_clip(request: Request) -> VisualEncoder:
    from vaflow.encoders import clip

    return clip.build_named(request)


def _any_ast(request: Request) -> AudioEncoder:
    from vaflow.encoders import ast

    return ast.build_named(request)


def _logmel(request: Request) -> AudioEncoder:
    raise UsageError(
        explain(
            "logmel has no network to build: its filter banks are kept for every clip with sound",
            remedy="Use vaflow.encoders.logmel.FilterBank",
        )
    )


# fmt: off
ENCODERS: Mapping[str, Entry] = {
    "clip-vit-b16": Entry("visual", _clip_b16),   # OpenAI's ViT-B/16
    "clip-vit-b32": Entry("visual", _clip_b32),   # OpenAI's ViT-B/32
    "clip-tiny":    Entry("visual", _clip_tiny),  # the same class, seeded weights, no download
    "resnet50":     Entry("visual", _resnet50),   # ResNet-50, ImageNet
    "resnet-tiny":  Entry("visual", _resnet_tiny),  # the same class, seeded weights, no download
    "ast":          Entry("audio",  _ast),        # Audio Spectrogram Transformer, AudioSet
    "ast-tiny":     Entry("audio",  _ast_tiny),   # the same class, seeded weights, no download
    "vggish":       Entry("audio",  _vggish),     # VGGish, YouTube-8M's precursor
    "vggish-tiny":  Entry("audio",  _vggish_tiny),  # the same class, seeded weights, no download
    "logmel":       Entry("logmel", _logmel),
}

FAMILIES: Mapping[str, Entry] = {
    "clip": Entry("visual", _any_clip),           # clip:MODEL/TAG_OR_FILE
    "ast":  Entry("audio",  _any_ast),            # ast:PATH_OR_HUB_ID
}
# fmt: on

FORMS = ("clip:MODEL/TAG_OR_FILE", "ast:PATH_OR_HUB_ID")


def _entry(name: str) -> Entry:
    if name in ENCODERS:
        return ENCODERS[name]
    family, colon, rest = name.partition(":")
    if not colon or family not in FAMILIES:
        raise UsageError(explain("Unknown encoder", got=name, choices=[*ENCODERS, *FORMS]))
    model, slash, source = rest.partition("/")
    if not rest or (family == "clip" and not (model and slash and source)):
        form = next(form for form in FORMS if form.startswith(f"{family}:"))
        raise UsageError(explain("This encoder's name is incomplete", expected=form, got=name))
    return FAMILIES[family]


def encoder_kind(name: str) -> EncoderKind:
    """What an encoder reads: "visual", "audio" or "logmel". Imports nothing heavy.

    Raises:
        UsageError: no encoder has that name; the choices are listed.
    """
    return _entry(name).kind


def build_encoder(
    name: str, *, weights: Path | None = None, device: str = "cpu", precision: str = "auto"
) -> VisualEncoder | AudioEncoder:
    """Build an encoder in evaluation mode.

    Args:
        name: a key of `ENCODERS`, `clip:MODEL/TAG_OR_FILE` or `ast:PATH_OR_HUB_ID`.
        weights: local weights to use instead of the hub's: a file (a folder for AST).
        device: "cpu", "cuda" or "cuda:N".
        precision: "auto" is float32 on every device, so that a cache does not depend on where it was made beyond
            rounding; "bfloat16" and, on CUDA, "float16" run the network in autocast and become part of the identity.

    Raises:
        UsageError: the name, the precision or the combination is wrong.
        WeightsError: weights are missing, unreachable, or do not fit.
    """
    entry = _entry(name)
    if precision not in PRECISIONS:
        raise UsageError(explain("Unknown precision", got=precision, choices=PRECISIONS))
    if precision == "float16" and not device.startswith("cuda"):
        raise UsageError(
            explain("float16 is for CUDA devices", choices=["float32", "bfloat16"], got=f"{precision} on {device}")
        )
    resolved = "float32" if precision == "auto" else precision
    if resolved == "float32" and device.startswith("cuda"):
        forbid_tf32()
    return entry.build(Request(name, weights, device, resolved))


def encode_text(encoder: VisualEncoder | AudioEncoder, texts: list[str]) -> NDArray[np.float32]:
    """N texts -> [N, D] float32, each of length one, in the space of the encoder's images.

    Raises:
        UsageError: the encoder has no text tower.
    """
    method = getattr(encoder, "encode_text", None)
    if method is None:
        raise UsageError(explain(f"{encoder.name} has no text tower", expected="a CLIP-like encoder"))
    result: NDArray[np.float32] = method(texts)
    return result
