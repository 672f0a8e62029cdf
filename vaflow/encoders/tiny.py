"""Tiny encoders of the genuine classes with seeded weights: no download, the same numbers on every machine.

Only width and depth shrink; input sizes, patches, strides and the tokenizer stay. The weights come from raw integers
of a counter-based generator, without logarithms or a library's own sampling, so they depend on no version of torch.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.ast import AstEncoder, make_encoder
from vaflow.encoders.ast_loading import AUDIOSET_MEAN, AUDIOSET_STD
from vaflow.encoders.clip import ClipEncoder, Preprocessing, make_identity
from vaflow.encoders.clip_loading import require_quick_gelu
from vaflow.encoders.images import Preparation

SEED = 0
WIDTH, LAYERS, HEAD_WIDTH = 128, 2, 64

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": LAYERS, "width": WIDTH, "head_width": HEAD_WIDTH, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": WIDTH,
        "heads": WIDTH // HEAD_WIDTH,
        "layers": LAYERS,
    },
}

AST_CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH // HEAD_WIDTH,
    "intermediate_size": 4 * WIDTH,
}

CLIP_GAIN = 4.0
AST_GAIN = 1.0


def build_clip(request: Request) -> ClipEncoder:
    """The tiny CLIP, both towers.

    Raises:
        UsageError: local weights were given.
    """
    import open_clip

    request.refuse_weights("its weights are seeded")
    model = open_clip.CLIP(**CLIP_CONFIG)
    seed_parameters(model, "clip-tiny", CLIP_GAIN)
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
    """The tiny Audio Spectrogram Transformer.

    Raises:
        UsageError: local weights were given.
    """
    from transformers import ASTConfig, ASTModel

    request.refuse_weights("its weights are seeded")
    module = ASTModel(ASTConfig(**AST_CONFIG, attn_implementation="sdpa"))
    seed_parameters(module, "ast-tiny", AST_GAIN)
    return make_encoder(request, module, AUDIOSET_MEAN, AUDIOSET_STD)


def seed_parameters(module: torch.nn.Module, name: str, gain: float) -> None:
    """Overwrite every parameter: matrices uniform with deviation gain / sqrt(fan in), norms one, biases zero.

    Patch embeddings, tokens and positions keep deviation without the gain. Each parameter has its own stream of random numbers, keyed by its name, so
    the order of parameters does not matter.
    """
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(_value(f"{SEED}/{name}/{key}", key, tuple(parameter.shape), gain)))


def _value(stream: str, key: str, shape: tuple[int, ...], gain: float) -> NDArray[np.float32]:
    if key.endswith("bias"):
        return np.zeros(shape, np.float32)
    if key == "logit_scale":
        return np.full(shape, np.float32(4.6051702))
    if len(shape) == 1 and key.endswith("weight"):  # of a norm
        return np.ones(shape, np.float32)
    fan_in = math.prod(shape[1:])
    if key.endswith("proj") or key.endswith("text_projection"):
        fan_in = shape[0]
    scale = 1.0 if len(shape) == 4 else gain
    if "position" in key or ("embedding" in key and len(shape) == 2) or "token" in key:
        return uniform(stream, shape, 0.5)
    return uniform(stream, shape, scale / math.sqrt(fan_in))


def uniform(stream: str, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
    """Uniform numbers of that standard deviation around zero; the same bits on every machine.

    24 bits of each draw make a fraction that float32 holds exactly; only one rounded multiplication follows.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    draws = np.random.Philox(key=key).random_raw(math.prod(shape))
    fraction = (draws >> np.uint64(40)).astype(np.float64) / 2**23 - (1 - 2**-24)
    return (fraction * (deviation * math.sqrt(3.0))).astype(np.float32).reshape(shape)
