"""Tiny encoders of the genuine classes with seeded weights: no download, the same numbers on every machine.

Only width and depth shrink; input sizes, patches, strides and the tokenizer stay. The weights come from raw integers of
a counter-based generator and correctly rounded arithmetic, so they depend on no library's sampling and no version.

Nothing is trained, so the scales are chosen such that features keep what a light head must read, and vary by about as
much as they are large. Measured on drawn faces and voices of unseen people: a linear read-out of single frames gives a
CCC of about .85 for valence (.1 to .3 with common initialisations; .84 from the pixels themselves), one of half-second
steps of sound .87 for arousal. What matters, most important first:

- Filters for pictures sum to zero in each channel: the colour of skin and wall would drown everything else. Filters for
  sound lose only most of their mean, for loudness tells much; their bias puts the usual level of sound at zero.
- Filters are coarse (cells of 8 x 8): fine random ones answer to little but noise.
- Queries and keys are small: attention is nearly flat, and the class token gathers the whole picture.
- Positions are as large as contents: with the gated units behind them, each place is read in its own way. For sound
  only the place along frequency counts, or the same sound would look different at each time.
- Values are large for pictures, or the class token would mostly be itself.

Tiny twins of the convolutional encoders: the genuine classes with seeded weights, no download.

Input sizes and strides stay; depth and widths shrink. Weights are drawn as in `tiny.py`, with
the deviation that keeps a ReLU network's scale from layer to layer (He et al. 2015).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.ast import (
    AUDIOSET_MEAN,
    AUDIOSET_STD,
    SPECIAL_TOKENS,
    AstEncoder,
    geometry_of,
    load_checkpoint,
    make_encoder,
)
from vaflow.encoders.clip import ClipEncoder, Preprocessing, make_identity, require_quick_gelu
from vaflow.encoders.images import Preparation
from vaflow.encoders.resnet import ResNetEncoder, bare_resnet
from vaflow.encoders.resnet import make_encoder as make_resnet
from vaflow.encoders.vggish import VGGish, VggishEncoder
from vaflow.encoders.vggish import make_encoder as make_vggish
from vaflow.encoders.weights import load_strictly, read_state_dict

SEED = 0
WIDTH, LAYERS, HEADS, PATCH = 128, 2, 4, 16
CELL = 8  # edge of the squares that patch filters are made of
PLACE, WORD_PLACE, INSTANT = 1.0, 0.1, 0.1  # deviation of position embeddings: in a picture or spectrum, a text, time
SOUND_MEAN_KEPT = 0.3  # how much of their mean the filters for sound keep
SOUND_LEVEL = -0.33  # normalised log-Mel of ordinary sound


@dataclass(frozen=True)
class Gains:
    """Deviation of a matrix by what it is for, times the root of the number of its inputs."""

    patch: float
    query: float
    value: float
    mlp: float


CLIP_GAINS = Gains(patch=4.0, query=0.5, value=4.0, mlp=0.5)
AST_GAINS = Gains(patch=2.0, query=0.5, value=1.0, mlp=1.0)

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 224,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": PATCH,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
}

AST_CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "patch_size": PATCH,
}

Values = NDArray[np.float64]
Rule = Callable[[str, str, tuple[int, ...]], Values]  # (stream of random numbers, parameter's name, shape) -> values


def build_clip(request: Request) -> ClipEncoder:
    """The tiny CLIP, both towers: seeded, or with the weights of the file `request.weights`.

    Raises:
        WeightsError: the file's weights do not fit.
    """
    import open_clip

    state = read_state_dict(request.weights) if request.weights else None
    model = open_clip.CLIP(**CLIP_CONFIG)
    if state is None:
        seed_parameters(model, "clip-tiny", _clip_values)
    else:
        load_strictly(model, state, str(request.weights))
    require_quick_gelu(model, request.name)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = Preprocessing(Preparation(CLIP_CONFIG["vision_cfg"]["image_size"]), mean, std)
    identity = make_identity("clip-tiny", model, preprocessing, request.precision)
    return ClipEncoder(
        request.name,
        model,
        open_clip.SimpleTokenizer,
        preprocessing,
        identity,
        request.device,
        request.precision,
    )


def build_ast(request: Request) -> AstEncoder:
    """The tiny Audio Spectrogram Transformer: seeded, or with the weights of the folder `request.weights`.

    Raises:
        WeightsError: the folder's weights do not fit.
    """
    from transformers import ASTConfig, ASTModel

    module = ASTModel(ASTConfig(**AST_CONFIG, attn_implementation="sdpa"))
    if request.weights:
        checkpoint = load_checkpoint(request.name, str(request.weights), local=True)
        load_strictly(module, checkpoint.module.state_dict(), str(request.weights))
        return make_encoder(request, module, checkpoint.mean, checkpoint.std)
    geometry = geometry_of(module)
    seed_parameters(module, "ast-tiny", _ast_values(geometry.frequency_tokens, geometry.time_tokens))
    return make_encoder(request, module, AUDIOSET_MEAN, AUDIOSET_STD)


def seed_parameters(module: torch.nn.Module, name: str, rule: Rule) -> None:
    """Overwrite every parameter by `rule`, each from a stream of its own, so that their order does not matter."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            values = rule(f"{SEED}/{name}/{key}", key, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _clip_values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
    if key == "visual.conv1.weight":
        return _coarse(stream, shape, CLIP_GAINS.patch, mean_kept=0.0)
    if key == "logit_scale":
        return np.full(shape, 4.605170)  # the logarithm of 100, where trained CLIP models end up
    if key == "positional_embedding":
        return uniform(stream, shape, WORD_PLACE)
    if key.startswith(("visual.positional", "visual.class", "token_embedding")):
        return uniform(stream, shape, PLACE)
    if key.endswith("in_proj_weight"):  # queries, keys and values in one matrix
        values = uniform(stream, shape, CLIP_GAINS.value / math.sqrt(shape[1]))
        values[: 2 * shape[1]] *= CLIP_GAINS.query / CLIP_GAINS.value
        return values
    gain = CLIP_GAINS.mlp if ".mlp." in key else CLIP_GAINS.value if ".attn." in key else 1.0
    return _common_values(stream, key, shape, gain)


def _ast_values(frequencies: int, times: int) -> Rule:
    def values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
        if ".projection." in key:
            weight_stream = stream.removesuffix("weight").removesuffix("bias")
            filters = _coarse(weight_stream, (WIDTH, 1, PATCH, PATCH), AST_GAINS.patch, SOUND_MEAN_KEPT)
            return filters if key.endswith("weight") else -SOUND_LEVEL * _cells(filters).sum(axis=(1, 2, 3)) * CELL**2
        if key.endswith("position_embeddings"):
            place = np.repeat(uniform(stream, (frequencies, shape[2]), PLACE), times, axis=0)
            place += uniform(f"{stream}/instant", place.shape, INSTANT)
            return np.concatenate([uniform(f"{stream}/special", (SPECIAL_TOKENS, shape[2]), PLACE), place])[None]
        if key.endswith("_token"):
            return uniform(stream, shape, PLACE)
        small = key.endswith(("q_proj.weight", "k_proj.weight"))
        gain = AST_GAINS.query if small else AST_GAINS.mlp if ".mlp." in key else AST_GAINS.value
        return _common_values(stream, key, shape, gain)

    return values


def _common_values(stream: str, key: str, shape: tuple[int, ...], gain: float) -> Values:
    """Biases zero, norms one, matrices of deviation gain / sqrt(inputs)."""
    if key.endswith("bias"):
        return np.zeros(shape)
    return np.ones(shape) if len(shape) == 1 else uniform(stream, shape, gain / math.sqrt(shape[1]))


def _coarse(stream: str, shape: tuple[int, ...], gain: float, mean_kept: float) -> Values:
    """Patch filters [out, channels, edge, edge], constant in cells; each keeps that part of its mean per channel."""
    out, channels, height, width = shape
    deviation = gain / math.sqrt(channels * height * width)
    cells = uniform(stream, (out, channels, height // CELL, width // CELL), deviation)
    cells -= (1 - mean_kept) * cells.mean(axis=(2, 3), keepdims=True)
    return cells.repeat(CELL, axis=2).repeat(CELL, axis=3)


def _cells(filters: Values) -> Values:
    """One number per cell of what `_coarse` made."""
    return filters[:, :, ::CELL, ::CELL]


def uniform(stream: str, shape: tuple[int, ...], deviation: float) -> Values:
    """Uniform numbers of about that standard deviation around zero; the same bits on every machine.

    24 bits of each draw make a symmetric fraction that is exact; one rounded multiplication by a float32 follows.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    draws = np.random.Philox(key=key).random_raw(math.prod(shape))
    fraction = ((draws >> np.uint64(40)).astype(np.float64) + 0.5) / 2**23 - 1
    scale = float(np.float32(deviation * math.sqrt(3.0)))
    return (fraction * scale).reshape(shape)


RESNET_BLOCKS, RESNET_WIDTH, RESNET_EXPANSION = [1, 1, 1, 1], 16, 1
VGGISH_CHANNELS, VGGISH_WIDTHS = ((16,), (32,), (48, 48), (64, 64)), (256, 256, 128)


def build_resnet(request: Request) -> ResNetEncoder:
    """The tiny ResNet.

    Raises:
        UsageError: local weights were given.
    """
    request.refuse_weights("its weights are seeded")
    module = bare_resnet(RESNET_BLOCKS, width=RESNET_WIDTH, expansion=RESNET_EXPANSION)
    seed_weights(module, "resnet-tiny")
    return make_resnet(request, "resnet-tiny", module)


def build_vggish(request: Request) -> VggishEncoder:
    """The tiny VGGish.

    Raises:
        UsageError: local weights were given.
    """
    request.refuse_weights("its weights are seeded")
    with torch.random.fork_rng():
        module = VGGish(VGGISH_CHANNELS, VGGISH_WIDTHS)
    seed_weights(module, "vggish-tiny")
    return make_vggish(request, module)


def seed_weights(module: torch.nn.Module, name: str) -> None:
    """Overwrite every convolution and dense layer: uniform, deviation sqrt(2 / fan in), biases zero.

    Batch norms stay what they are at first, the identity in evaluation mode.
    """
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                shape = tuple(parameter.shape)
                deviation = math.sqrt(2 / math.prod(shape[1:]))
                parameter.copy_(torch.from_numpy(uniform(f"{SEED}/{name}/{key}", shape, deviation)))
            elif key.endswith("bias"):
                parameter.zero_()
