"""Learned context vectors in front of the words of a frozen text tower (prompt learning).

Source: Zhou et al. 2022 (CoOp, arXiv 2109.01134), with one context shared by all descriptions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.errors import UsageError, explain

PLACEHOLDER = "x"  # one token of CLIP's vocabulary, whose embedding a vector replaces


class ContextTower:
    """[count, width] vectors -> [N, D] text embeddings of length one, with gradients to the vectors only.

    Not a module: the tower is neither trained nor saved.

    Args:
        model: an open_clip model.
        tokenizer: texts -> [N, L] tokens.
        texts: N descriptions.
        count: vectors between the start token and the words.
        device: the model's.

    Attributes:
        width: of a vector.

    Raises:
        UsageError: the tower has no token embedding that vectors can replace, or the context is too long.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], torch.Tensor],
        texts: Sequence[str],
        count: int,
        device: torch.device,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        embedding = getattr(getattr(model, "text", model), "token_embedding", None)
        if not isinstance(embedding, torch.nn.Embedding):
            raise UsageError(explain("This text tower does not support context vectors", expected="a CLIP encoder"))
        tokens = tokenizer([f"{PLACEHOLDER} " * count + text for text in texts])
        slots = tokens[:, 1 : 1 + count]
        longest = int((tokens != 0).sum(dim=1).max())
        if count < 1 or slots.shape[1] < count or not (slots == slots[0, 0]).all() or longest >= tokens.shape[1]:
            raise UsageError(
                explain(
                    "The context vectors and the descriptions do not fit into the text tower",
                    expected=f"fewer than {tokens.shape[1]} tokens together",
                    got=f"{count} vectors",
                )
            )
        self._embedding, self._tokens, self._count = embedding, tokens.to(device), count
        self.width = embedding.embedding_dim

    def __call__(self, context: torch.Tensor) -> torch.Tensor:
        """[count, width] -> [N, D] float32.

        Raises:
            ValueError: the context has another shape.
        """
        if tuple(context.shape) != (self._count, self.width):
            raise ValueError(f"expected a context [{self._count}, {self.width}]; got {[*context.shape]}")
        after = 1 + self._count

        def insert(module: torch.nn.Module, tokens: object, words: torch.Tensor) -> torch.Tensor:
            shared = context.to(words.dtype).expand(words.shape[0], -1, -1)
            return torch.cat([words[:, :1], shared, words[:, after:]], dim=1)

        handle = self._embedding.register_forward_hook(insert)
        try:
            embedded: torch.Tensor = self._model.encode_text(self._tokens, normalize=True)
        finally:
            handle.remove()
        return embedded.to(torch.float32)


def context_tower(encoder: VisualEncoder | AudioEncoder, texts: Sequence[str], count: int) -> ContextTower:
    """Return the text tower of an encoder; the whole encoder is frozen.

    Raises:
        UsageError: the encoder has no text tower, or one that does not support vectors.
    """
    make = getattr(encoder, "context_tower", None)
    if make is None:
        raise UsageError(explain(f"{encoder.name} has no text tower", expected="a CLIP encoder"))
    tower: ContextTower = make(texts, count)
    return tower
