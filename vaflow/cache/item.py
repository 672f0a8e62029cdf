"""What reading an item gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from vaflow.cache.schema import Array, Json


@dataclass(frozen=True)
class Item:
    """The arrays of one item of one stream; each is also an attribute: `item.embedding`, `item.time`, `item.valid`.

    Attributes:
        stream: where it comes from.
        item: its id.
        arrays: name -> array, as the stream's kind in `KINDS` says.
        meta: facts about the item, from its record.
    """

    stream: str
    item: str
    arrays: Mapping[str, Array]
    meta: Json

    def __getattr__(self, name: str) -> Array:
        arrays = self.__dict__.get("arrays", {})  # not yet there while a copy is being made
        if name in arrays:
            found: Array = arrays[name]
            return found
        raise AttributeError(f"no array {name!r} was read of {self.__dict__.get('item')!r}; there are {sorted(arrays)}")

    @property
    def images(self) -> list[bytes]:
        """Pixels: one JPEG file per sample, empty where there was no face."""
        edges = self.offset.tolist()
        data = self.data
        return [data[start:end].tobytes() for start, end in pairwise(edges)]
