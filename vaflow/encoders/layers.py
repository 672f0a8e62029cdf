"""Selection of a transformer's layers: the part of an encoder's name after `@`.

`@last` (default) is the network's output, after its final normalisation where it has one. `@7` is the output of block
7, `@0` that of the embeddings; `@6-12` and `@all` store several layers, on an axis of their own; `@mean` stores the
mean of all. `pool=cls|pooler|mean` chooses how tokens become one vector, as in `@6-12,pool=mean`.
"""

import re
from dataclasses import dataclass

from vaflow.errors import UsageError, explain

POOLINGS = ("cls", "pooler", "mean")
WITH_LAYERS = re.compile(r"(hf|clip|ast|timm):.|(clip|ast)-|ast$")  # begins names of encoders that are transformers
_SUFFIX = re.compile(r"@(?:(last|mean|all|\d{1,3}(?:-\d{1,3})?)(?:,pool=(\w+))?|pool=(\w+))$")


@dataclass(frozen=True)
class LayerChoice:
    """The layers and the pooling that a name selects.

    Attributes:
        layers: "last", "mean", "all", "N" or "N-M".
        pooling: one of `POOLINGS`, or "" for the family's default.
    """

    layers: str = "last"
    pooling: str = ""

    @property
    def stacked(self) -> bool:
        """Whether several layers are stored, on an axis of their own."""
        return self.layers == "all" or len(set(self.layers.split("-"))) > 1

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers, out of 0 to `count`; () for the network's output.

        Raises:
            UsageError: the network has no such layer.
        """
        if self.layers == "last":
            return ()
        if self.layers in ("all", "mean"):
            return tuple(range(count + 1))
        first, _, last = self.layers.partition("-")
        numbers = tuple(range(int(first), int(last or first) + 1))
        if not numbers or numbers[-1] > count:
            expected = f"@N or @N-M with layers 0 (embeddings) to {count}, or @last, @mean, @all"
            raise UsageError(explain(f"{name} has no such layer", expected=expected, got=f"@{self.layers}"))
        return numbers


def split_layers(name: str, source: str) -> tuple[str, LayerChoice]:
    """Split SOURCE[@LAYERS[,pool=POOLING]].

    Raises:
        UsageError: the pooling is unknown.
    """
    match = _SUFFIX.search(source)
    if match is None:
        return source, LayerChoice()
    pooling = match[2] or match[3] or ""
    if pooling and pooling not in POOLINGS:
        raise UsageError(explain(f"{name} names an unknown pooling", got=pooling, choices=POOLINGS))
    return source[: match.start()], LayerChoice(match[1] or "last", pooling)


def with_layers(name: str, layers: str) -> str:
    """Return an encoder's name with the layers of `--layers`.

    Names with layers of their own, and names that are no transformer's, are returned unchanged.

    Raises:
        UsageError: `layers` is not of the form that follows `@`.
    """
    if _SUFFIX.fullmatch(f"@{layers}") is None:
        raise UsageError(
            explain("--layers is not a choice of layers", expected="N, N-M, last, mean or all", got=layers)
        )
    return f"{name}@{layers}" if WITH_LAYERS.match(name) and _SUFFIX.search(name) is None else name
