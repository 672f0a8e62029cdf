"""Tiny encoders of the genuine classes with seeded weights: no download, the same numbers on every machine.

Only width and depth shrink; input sizes, patches, strides and the tokenizer stay. The weights come from raw integers of
a counter-based generator and correctly rounded arithmetic, so they depend on no library's sampling and no version.

Nothing is trained, so the scales are chosen such that features keep what a light head must read. A linear read-out of
single frames of drawn, unseen people gives a CCC of about .73 for valence (.1 with common initialisations), one of
half-second steps of their voices about .9 for arousal. What matters, most important first:

- Filters for pictures sum to zero in each channel: the colour of skin and wall would drown everything else.
  Filters for sound do not: loudness tells much.
- Filters are coarse (cells of 8 x 8): fine random ones answer to little but noise.
- Queries and keys are small: attention is nearly flat, and the class token gathers the whole picture.
- Positions are as large as contents: with the gated units behind them, each place is read in its own way. For sound
  only the place along frequency counts, or the same sound would look different at each time.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.ast import SPECIAL_TOKENS, AstEncoder, make_encoder
from vaflow.encoders.ast_loading import AUDIOSET_MEAN, AUDIOSET_STD, load_checkpoint
from vaflow.encoders.clip import ClipEncoder, Preprocessing, make_identity
from vaflow.encoders.clip_loading import require_quick_gelu
from vaflow.encoders.images import Preparation
from vaflow.encoders.weights import load_strictly, read_state_dict

SEED = 0
WIDTH, LAYERS, HEADS = 128, 2, 4
CELL = 8  # edge of the squares that patch filters are made of
QUERY_GAIN, VALUE_GAIN, MLP_GAIN = 0.5, 1.0, 2.0  # deviation of a matrix, times the root of its inputs
PLACE, WORD_PLACE, INSTANT = 1.0, 0.1, 0.1  # deviation of position embeddings: in a picture or spectrum, a text, time

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 224,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
}

AST_CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
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
    encoder = make_encoder(request, module, AUDIOSET_MEAN, AUDIOSET_STD)
    seed_parameters(module, "ast-tiny", _ast_values(encoder.geometry.frequency_tokens, encoder.geometry.time_tokens))
    return make_encoder(request, module, AUDIOSET_MEAN, AUDIOSET_STD)


def seed_parameters(module: torch.nn.Module, name: str, rule: Rule) -> None:
    """Overwrite every parameter by `rule`, each from a stream of its own, so that their order does not matter."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            values = rule(f"{SEED}/{name}/{key}", key, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _clip_values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
    if key == "visual.conv1.weight":
        cells = _coarse(stream, shape)
        # Exact: a cell is a 25-bit fraction, and a filter has four of them in each channel.
        return cells - cells[:, :, ::CELL, ::CELL].mean(axis=(2, 3), keepdims=True)
    if key == "logit_scale":
        return np.full(shape, 4.605170)  # the logarithm of 100, where trained CLIP models end up
    if key == "positional_embedding":
        return uniform(stream, shape, WORD_PLACE)
    if key.startswith(("visual.positional", "visual.class", "token_embedding")):
        return uniform(stream, shape, PLACE)
    values = _common_values(stream, key, shape)
    if key.endswith("in_proj_weight"):  # queries, keys and values in one matrix
        values[: 2 * shape[1]] *= QUERY_GAIN / VALUE_GAIN
    return values


def _ast_values(frequencies: int, times: int) -> Rule:
    def values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
        if key.endswith("projection.weight"):
            return _coarse(stream, shape)
        if key.endswith("position_embeddings"):
            place = np.repeat(uniform(stream, (frequencies, shape[2]), PLACE), times, axis=0)
            place += uniform(f"{stream}/instant", place.shape, INSTANT)
            return np.concatenate([uniform(f"{stream}/special", (SPECIAL_TOKENS, shape[2]), PLACE), place])[None]
        if key.endswith("_token"):
            return uniform(stream, shape, PLACE)
        return _common_values(stream, key, shape)

    return values


def _common_values(stream: str, key: str, shape: tuple[int, ...]) -> Values:
    """Biases zero, norms one, matrices by what they are for."""
    if key.endswith("bias"):
        return np.zeros(shape)
    if len(shape) == 1:
        return np.ones(shape)
    small = key.endswith(("q_proj.weight", "k_proj.weight"))
    gain = QUERY_GAIN if small else MLP_GAIN if ".mlp." in key else VALUE_GAIN
    return uniform(stream, shape, gain / math.sqrt(shape[1]))


def _coarse(stream: str, shape: tuple[int, ...]) -> Values:
    """Patch filters [out, channels, edge, edge] that are constant in cells of `CELL` x `CELL`."""
    out, channels, height, width = shape
    cells = uniform(stream, (out, channels, height // CELL, width // CELL), 1 / math.sqrt(channels * height * width))
    return cells.repeat(CELL, axis=2).repeat(CELL, axis=3)


def uniform(stream: str, shape: tuple[int, ...], deviation: float) -> Values:
    """Uniform numbers of about that standard deviation around zero; the same bits on every machine.

    24 bits of each draw make a symmetric fraction that is exact; one rounded multiplication by a float32 follows.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    draws = np.random.Philox(key=key).random_raw(math.prod(shape))
    fraction = ((draws >> np.uint64(40)).astype(np.float64) + 0.5) / 2**23 - 1
    scale = float(np.float32(deviation * math.sqrt(3.0)))
    return (fraction * scale).reshape(shape)
