"""Tiny encoders of the genuine classes with seeded weights: no download, the same features on every machine.

Only width and depth shrink; input sizes, patches, strides and the tokenizer stay. The weights come from raw integers of
a counter-based generator and correctly rounded arithmetic, so they depend on no library's sampling and no version.

The networks are untrained, so the scales are chosen such that a light head can read the features. Measured on drawn
faces and voices of unseen people: a linear read-out of single frames gives a CCC of about .85 for valence (.1 to .3
with common initialisations; .84 from the pixels themselves), a linear read-out of half-second audio steps .87 for
arousal. What matters, most important first:

- Image filters sum to zero in each channel: otherwise the colour of skin and wall dominates. Audio filters lose only
  most of their mean, because loudness is informative; their bias maps the usual level of audio to zero.
- Filters are coarse (cells of 8 x 8): fine random filters respond to noise only.
- Queries and keys are small: attention is nearly flat, and the class token averages the whole image.
- Position embeddings are as large as patch embeddings, so that the gated units respond differently to each position.
  For audio this holds along frequency only, so that equal audio has equal features at every time.
- Value matrices are large for images; otherwise the class token would mostly copy itself.

The convolutional networks are drawn with the deviation that keeps a ReLU network's scale from layer to layer (He et
al. 2015).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import clip, image_models, vggish
from vaflow.encoders.ast import AUDIOSET_MEAN, AUDIOSET_STD, SPECIAL_TOKENS, AstEncoder, Geometry, load_checkpoint
from vaflow.encoders.base import LayerChoice, Request, split_layers
from vaflow.encoders.clip import require_quick_gelu
from vaflow.encoders.image_models import ImageEncoder
from vaflow.encoders.preprocessing import Preparation, Preprocessing
from vaflow.encoders.weights import load_strictly, read_state_dict, without_initial_weights
from vaflow.errors import WeightsError, explain

SEED = 0
WIDTH, LAYERS, HEADS, PATCH = 128, 2, 4, 16
BLOCK = 2**14  # random numbers that are drawn at a time; they stay in the processor's cache
CELL = 8  # edge of the squares that patch filters are made of
PATCH_POSITION, WORD_POSITION, TIME_POSITION = 1.0, 0.1, 0.1  # standard deviations of position embeddings
AUDIO_MEAN_KEPT = 0.3  # share of the mean that is left in audio filters
AUDIO_LEVEL = -0.33  # normalised log-Mel of ordinary audio


@dataclass(frozen=True)
class Gains:
    """Deviation of a matrix by its role, times the root of the number of its inputs."""

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

RESNET_BLOCKS, RESNET_WIDTH, RESNET_EXPANSION = [1, 1, 1, 1], 16, 1
VGGISH_CHANNELS, VGGISH_WIDTHS = ((16,), (32,), (48, 48), (64, 64)), (256, 256, 128)

Values = NDArray[np.float64]
Drawn = Values | NDArray[np.float32]
Rule = Callable[[str, str, tuple[int, ...]], Drawn]  # (stream of random numbers, parameter's name, shape) -> values


def build(request: Request) -> AstEncoder | ImageEncoder | vggish.VggishEncoder:
    """Return the tiny encoder `request.source`: seeded, or (CLIP and AST) with the weights `request.weights`.

    Raises:
        UsageError: local weights were given to an encoder that cannot load them.
        WeightsError: the weights do not fit.
    """
    source, choice = split_layers(request.name, request.source)
    if source == "clip":
        return _build_clip(request, choice)
    if source == "ast":
        return _build_ast(request, choice)
    request.refuse_weights("its weights are seeded")
    if request.source == "resnet":
        network = image_models.bare_resnet(RESNET_BLOCKS, width=RESNET_WIDTH, expansion=RESNET_EXPANSION)
        seed_weights(network, "resnet-tiny")
        return image_models.resnet_encoder(request, "resnet-tiny", network)
    with without_initial_weights():
        module = vggish.VGGish(VGGISH_CHANNELS, VGGISH_WIDTHS)
    seed_weights(module, "vggish-tiny")
    return vggish.VggishEncoder(request, module)


def _build_clip(request: Request, choice: LayerChoice) -> ImageEncoder:
    import open_clip

    with without_initial_weights():
        model = open_clip.CLIP(**CLIP_CONFIG)
    if request.weights is None:
        seed_parameters(model, "clip-tiny", _clip_values)
    else:
        load_strictly(model, read_state_dict(request.weights), str(request.weights))
    require_quick_gelu(model, request.name)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = Preprocessing(Preparation(CLIP_CONFIG["vision_cfg"]["image_size"]), mean, std)
    return clip.make_encoder(request, choice, "clip-tiny", model, open_clip.SimpleTokenizer, preprocessing)


def _build_ast(request: Request, choice: LayerChoice) -> AstEncoder:
    from transformers import ASTConfig, ASTModel

    with without_initial_weights():
        module = ASTModel(ASTConfig(**AST_CONFIG, attn_implementation="sdpa"))
    if request.weights is not None:
        if not request.weights.is_dir():
            problem = f"The folder {request.weights} does not exist"
            raise WeightsError(explain(problem, remedy="Check the path after NAME="))
        loaded, mean, std = load_checkpoint(request.weights)
        load_strictly(module, loaded.state_dict(), str(request.weights))
        return AstEncoder(request, module, mean, std, choice)
    geometry = Geometry.of(module)
    seed_parameters(module, "ast-tiny", _ast_values(geometry.frequency_tokens, geometry.tokens.count))
    return AstEncoder(request, module, AUDIOSET_MEAN, AUDIOSET_STD, choice)


def seed_parameters(module: torch.nn.Module, name: str, rule: Rule) -> None:
    """Overwrite every parameter by `rule`, each from its own random stream: their order does not matter."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            values = rule(f"{SEED}/{name}/{key}", key, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32, copy=False)))


@cache
def _clip_values(stream: str, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Drawing takes longer than all the rest of a build, so a process keeps the numbers (2 MB)."""
    return _draw_clip_values(stream, key, shape).astype(np.float32)


def _draw_clip_values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
    if key == "visual.conv1.weight":
        return _coarse(stream, shape, CLIP_GAINS.patch, mean_kept=0.0)
    if key == "logit_scale":
        return np.full(shape, 4.605170)  # the logarithm of 100, where trained CLIP models end up
    if key == "positional_embedding":
        return uniform(stream, shape, WORD_POSITION)
    if key.startswith(("visual.positional", "visual.class", "token_embedding")):
        return uniform(stream, shape, PATCH_POSITION)
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
            filters = _coarse(weight_stream, (WIDTH, 1, PATCH, PATCH), AST_GAINS.patch, AUDIO_MEAN_KEPT)
            return filters if key.endswith("weight") else -AUDIO_LEVEL * _cells(filters).sum(axis=(1, 2, 3)) * CELL**2
        if key.endswith("position_embeddings"):
            place = np.repeat(uniform(stream, (frequencies, shape[2]), PATCH_POSITION), times, axis=0)
            place += uniform(f"{stream}/instant", place.shape, TIME_POSITION)
            special = uniform(f"{stream}/special", (SPECIAL_TOKENS, shape[2]), PATCH_POSITION)
            return np.concatenate([special, place])[None]
        if key.endswith("_token"):
            return uniform(stream, shape, PATCH_POSITION)
        small = key.endswith(("q_proj.weight", "k_proj.weight"))
        gain = AST_GAINS.query if small else AST_GAINS.mlp if ".mlp." in key else AST_GAINS.value
        return _common_values(stream, key, shape, gain)

    return values


def _common_values(stream: str, key: str, shape: tuple[int, ...], gain: float) -> Values:
    """Return zeros for biases, ones for norms, deviation gain / sqrt(inputs) for matrices."""
    if key.endswith("bias"):
        return np.zeros(shape)
    return np.ones(shape) if len(shape) == 1 else uniform(stream, shape, gain / math.sqrt(shape[1]))


def _coarse(stream: str, shape: tuple[int, ...], gain: float, mean_kept: float) -> Values:
    """Return filters [out, channels, edge, edge], constant in cells, with that share of their mean per channel."""
    out, channels, height, width = shape
    deviation = gain / math.sqrt(channels * height * width)
    cells = uniform(stream, (out, channels, height // CELL, width // CELL), deviation)
    cells -= (1 - mean_kept) * cells.mean(axis=(2, 3), keepdims=True)
    return cells.repeat(CELL, axis=2).repeat(CELL, axis=3)


def _cells(filters: Values) -> Values:
    """Return one value per cell of filters from `_coarse`."""
    return filters[:, :, ::CELL, ::CELL]


def uniform(stream: str, shape: tuple[int, ...], deviation: float) -> Values:
    """Return uniform numbers of about that standard deviation around zero; the same bits on every machine.

    24 bits of each draw give an exact symmetric fraction; one rounded multiplication by a float32 follows.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    generator = np.random.Philox(key=key)
    scale = float(np.float32(deviation * math.sqrt(3.0)))
    values = np.empty(math.prod(shape))
    for block in np.split(values, range(BLOCK, values.size, BLOCK)):
        draws = generator.random_raw(block.size)
        np.add(draws >> np.uint64(40), 0.5, out=block)
        block /= 2**23
        block -= 1
        block *= scale
    return values.reshape(shape)


def seed_weights(module: torch.nn.Module, name: str) -> None:
    """Overwrite every convolution and dense layer: uniform, deviation sqrt(2 / fan in), biases zero.

    Batch norms keep their initial values, the identity in evaluation mode.
    """
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                shape = tuple(parameter.shape)
                deviation = math.sqrt(2 / math.prod(shape[1:]))
                parameter.copy_(torch.from_numpy(uniform(f"{SEED}/{name}/{key}", shape, deviation)))
            elif key.endswith("bias"):
                parameter.zero_()
