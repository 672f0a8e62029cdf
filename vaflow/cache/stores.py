"""What a store must do, and the stores there are. A store turns arrays into files and bytes into arrays, no more.

When files are flushed, checked, committed or deleted is decided elsewhere (`commit.py`, `cache.py`). A new store is one
file with these four functions and one line in `STORES`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vaflow.cache.hdf5_store import Hdf5Store
from vaflow.cache.schema import Array, Blob, Rows, StoreName
from vaflow.cache.zarr_store import ZarrStore


class Store(Protocol):
    """Arrays of one attempt <-> files. Names of files are below the item's folder, with `/`."""

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        """Write `arrays` into the existing `folder` under the new name `attempt`; returns every file made."""
        ...

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        """Which of the attempt's `files` are needed to read the arrays `names`."""
        ...

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        """The arrays `names` out of the bytes of the files that `files_for` asked for; they can be written to.

        Raises:
            ValueError, KeyError, OSError: the bytes do not hold them.
        """
        ...

    def path(self, folder: Path, attempt: str) -> Path:
        """What to delete when the attempt is to go."""
        ...


STORES: Mapping[StoreName, Store] = {"zarr": ZarrStore(), "hdf5": Hdf5Store()}
