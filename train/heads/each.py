"""Two sets of weights as one model: valence from the epoch that was best in valence, arousal from its own."""

import torch
from torch import nn

from vaflow.train.batch import Batch, Output


class EachModel(nn.Module):
    """Valence as one model says it, arousal as another does; other logits are the mean of both.

    Args:
        valence, arousal: models of the same inputs.
    """

    def __init__(self, valence: nn.Module, arousal: nn.Module) -> None:
        super().__init__()
        self.valence = valence
        self.arousal = arousal

    def forward(self, batch: Batch) -> Output:
        """A batch -> va [B, F, 2], region logits [B, F, 9] (or None), other logits."""
        one: Output = self.valence(batch)
        other: Output = self.arousal(batch)
        va = torch.stack([one.va[..., 0], other.va[..., 1]], dim=-1)
        extra = {name: (logits + other.extra[name]) / 2 for name, logits in one.extra.items()}
        if one.region_logits is None or other.region_logits is None:
            return Output(va, None, extra)
        return Output(va, (one.region_logits + other.region_logits) / 2, extra)
