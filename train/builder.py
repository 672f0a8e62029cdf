"""Build a model from settings, and load the text tower for learned context vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaflow.encoders import build_encoder, context_tower
from vaflow.encoders.clip import ContextTower
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.train.batch import StreamSpec, TargetSpec
from vaflow.train.config import TEXT_SUFFIX, TrainConfig
from vaflow.train.heads.model import VAModel
from vaflow.train.inputs import Inputs


def open_tower(config: TrainConfig, inputs: Inputs, device: torch.device) -> ContextTower | None:
    """The text tower for `config.prompt_context` vectors; None without context vectors.

    Raises:
        UsageError: the cache has no prototypes or no descriptions, or the encoder does not support context vectors.
        FingerprintError: the encoder is not the one that made the cache's prototypes.
        WeightsError: the weights cannot be loaded.
    """
    if not config.prompt_context:
        return None
    if not inputs.descriptions:
        raise UsageError(
            explain(
                "prompt_context requires the descriptions of the nine regions",
                expected="prompt embeddings that `vaflow extract` or `vaflow cache prompts` made",
                got=f"stream {inputs.text!r}" if inputs.text else "a cache without prompt embeddings",
            )
        )
    name = inputs.text.removesuffix(TEXT_SUFFIX)
    weights = Path(config.text_weights) if config.text_weights else None
    encoder = build_encoder(name, weights=weights, device=str(device))
    if encoder.identity != dict(inputs.text_identity):
        raise FingerprintError(
            explain(
                f"{name} is not the encoder that made the cache's prompt embeddings",
                expected=f"weights {inputs.text_identity.get('weights')}",
                got=f"weights {encoder.identity.get('weights')}",
                remedy="Pass the same weights: --set text_weights=PATH",
            )
        )
    return context_tower(encoder, inputs.descriptions, config.prompt_context)


def build_model(
    config: TrainConfig,
    streams: Sequence[StreamSpec],
    prototypes: Tensor | None,
    context: tuple[int, int] | None = None,
    targets: Sequence[TargetSpec] = (),
) -> VAModel:
    """Build a model with new weights, on the CPU; seed the generator before.

    Args:
        config: settings.
        streams: input streams.
        prototypes: [9, D], or None: without a prompt head.
        context: number and width of the learned context vectors; None: fixed prototypes.
        targets: further targets.

    Raises:
        UsageError: settings that do not go together.
    """
    return VAModel(streams, prototypes, context=context, targets=targets, **model_options(config))


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of `VAModel` from the settings."""
    options: dict[str, Any] = {"layers": config.layers} if config.layers else {}
    if config.temporal == "tcn":
        options["causal"] = config.causal
    if config.temporal == "transformer":
        options["heads"] = config.attention_heads
    return {
        "hidden": config.hidden,
        "temporal": config.temporal,
        "temporal_options": options,
        "fusion": config.fusion,
        "attention_heads": config.attention_heads,
        "attention_positions": config.attention_positions,
        "dropout": config.dropout,
        "normalize": config.normalize,
        "learnable_prototypes": config.learnable_prompts,
        "variance": config.uncertainty == "variance",
    }
