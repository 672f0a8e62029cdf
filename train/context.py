"""Prompts that are trained: the text tower that made a cache's prototypes, opened for learned context vectors."""

from pathlib import Path

import torch

from vaflow.encoders import build_encoder
from vaflow.encoders.context import ContextTower, context_tower
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.train.config import TEXT_SUFFIX, TrainConfig
from vaflow.train.inputs import Inputs


def open_tower(config: TrainConfig, inputs: Inputs, device: torch.device) -> ContextTower | None:
    """The tower for `config.prompt_context` vectors; None where none are wanted.

    Raises:
        UsageError: the cache has no prototypes, does not know their words, or their encoder takes no vectors.
        FingerprintError: the encoder is not the one that made the cache's prototypes.
        WeightsError: its weights cannot be had or do not fit.
    """
    if not config.prompt_context:
        return None
    if not inputs.descriptions:
        raise UsageError(
            explain(
                "Context vectors need the words of the nine regions",
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
                remedy="Name the same weights with --set text_weights=PATH",
            )
        )
    return context_tower(encoder, inputs.descriptions, config.prompt_context)
