"""Which runs can train together: one architecture, the same windows, and losses of the same terms."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from vaflow.train.config import TrainConfig

LIMIT = 8  # runs that train together

# Settings that may differ between runs that train together.
VARYING = {
    *("seed", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "epochs", "patience", "best", "prompts"),
    *("kl_weight", "mse_weight", "ccc_weight", "extra_weight", "centers", "sigma", "dropout", "modality_dropout"),
}
T = TypeVar("T")


def can_train_together(config: TrainConfig) -> bool:
    """Whether runs of these resolved settings equal those alone.

    Encoders and prompts that are trained are not stacked, and the attention of a Transformer draws dropout masks of
    its own.
    """
    draws_masks = config.temporal == "transformer" and config.dropout > 0
    return not (config.finetune or config.prompt_context or draws_masks)


def batches_of(items: Sequence[T], config_of: Callable[[T], TrainConfig], processes: int = 1) -> list[list[T]]:
    """Divide runs into batches that can train together, in their order; a run without company is a batch of one.

    Args:
        items: runs.
        config_of: the resolved settings of a run.
        processes: how many batches are trained at once: batches are made small enough for all of them.
    """
    groups: dict[object, list[T]] = {}
    for number, item in enumerate(items):
        config = config_of(item)
        groups.setdefault(_shape(config) if can_train_together(config) else number, []).append(item)
    size = min(LIMIT, -(-len(items) // processes))
    counts = [(group, -(-len(group) // size)) for group in groups.values()]
    return [g[k * len(g) // count : (k + 1) * len(g) // count] for g, count in counts for k in range(count)]


def _shape(config: TrainConfig) -> tuple[object, ...]:
    """Equal for runs that can train together."""
    fixed = tuple((name, value) for name, value in vars(config).items() if name not in VARYING)
    return (*fixed, config.kl_weight > 0, config.mse_weight > 0)
