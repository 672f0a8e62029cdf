"""Zarr v3: an attempt is a group `<attempt>/` whose members are the arrays."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache.schema import DTYPES, Array, Blob, Rows

LARGEST_CHUNK = 64 * 2**20  # bytes; longer arrays are split along their first axis
_RAW_CODECS = ([{"name": "bytes", "configuration": {"endian": "little"}}], [{"name": "bytes"}])


class ZarrStore:
    """Uncompressed, one chunk per array up to 64 MiB, all-zero chunks written too (a missing one reads as zeros)."""

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        import zarr

        top = folder / attempt
        top.mkdir()
        # zarr makes a group with hard links, which not every system has, unless it may overwrite; the folder is new
        # and empty, so there is nothing to lose. It does so again for a member of a group, so each stands alone.
        zarr.create_group(store=top, zarr_format=3, overwrite=True)
        for name, array in arrays.items():
            chunks = chunk_shape(array)
            made = zarr.create_array(
                store=top / name,
                shape=array.shape,
                dtype=array.dtype,
                zarr_format=3,
                overwrite=True,
                chunks=chunks,
                filters=None,
                compressors=None,
                config={"write_empty_chunks": True},
            )
            for start in range(0, len(array), chunks[0]):  # chunk by chunk: a long array is never in memory whole
                made[start : start + chunks[0]] = array[start : start + chunks[0]]
        return sorted(path.relative_to(folder).as_posix() for path in top.rglob("*") if path.is_file())

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        wanted = tuple(f"{attempt}/{name}/" for name in names)
        return [file for file in files if file.startswith(wanted) or file == f"{attempt}/zarr.json"]

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        arrays = {name: _read_raw(attempt, blobs, name) for name in names}
        rest = [name for name, array in arrays.items() if array is None]
        return {**arrays, **(_read_by_zarr(attempt, blobs, rest) if rest else {})}  # type: ignore[dict-item]

    def path(self, folder: Path, attempt: str) -> Path:
        return folder / attempt


def chunk_shape(array: Rows) -> tuple[int, ...]:
    """One chunk, or rows of at most `LARGEST_CHUNK` bytes; lengths of 0 count as 1, as Zarr wants."""
    shape = tuple(max(1, length) for length in array.shape)
    if array.nbytes <= LARGEST_CHUNK:
        return shape
    row = array.nbytes // array.shape[0]
    return (max(1, LARGEST_CHUNK // row), *shape[1:])


def _read_raw(attempt: str, blobs: Mapping[str, Blob], name: str) -> Array | None:
    """An array in raw chunks of whole rows is the bytes of its files: 30 times faster than asking zarr. Else None."""
    metadata: dict[str, Any] = json.loads(blobs[f"{attempt}/{name}/zarr.json"].tobytes())
    shape = tuple(metadata["shape"])
    grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    rows = _rows_per_chunk(grid, shape)
    if (
        rows is None
        or keys != {"name": "default", "configuration": {"separator": "/"}}
        or metadata["codecs"] not in _RAW_CODECS
    ):
        return None
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    prefix, rest = f"{attempt}/{name}/c/", "/0" * (len(shape) - 1)
    chunks = [blobs[f"{prefix}{number}{rest}"] for number in range(-(-shape[0] // rows))]
    if len(chunks) != sum(key.startswith(prefix) for key in blobs):
        raise ValueError(f"array {name!r} has chunks beyond its shape")
    whole = [chunk.view(dtype).reshape(rows, *shape[1:]) for chunk in chunks]
    if len(whole) == 1:
        return whole[0]
    whole[-1] = whole[-1][: shape[0] - rows * (len(whole) - 1)]  # the last chunk is filled up
    return np.concatenate(whole)


def _rows_per_chunk(grid: Any, shape: tuple[int, ...]) -> int | None:
    """How many rows a chunk has, where the chunks are whole rows, at most all of them; None where they are not."""
    if not shape or 0 in shape:
        return None
    chunks: list[Any] = list(grid["configuration"]["chunk_shape"]) if grid.get("name") == "regular" else []
    if len(chunks) != len(shape) or tuple(chunks[1:]) != shape[1:]:
        return None
    return chunks[0] if type(chunks[0]) is int and 0 < chunks[0] <= shape[0] else None


def _check_plain(attempt: str, blobs: Mapping[str, Blob], name: str) -> None:
    """Only what the contract allows goes to zarr: no codecs but raw bytes, no chunks that are not there.

    Raises:
        ValueError: it is something else; the shape in the metadata would be filled up with zeros, say.
    """
    metadata: dict[str, Any] = json.loads(blobs[f"{attempt}/{name}/zarr.json"].tobytes())
    shape, chunks = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    if metadata["codecs"] not in _RAW_CODECS or metadata["data_type"] not in DTYPES:
        raise ValueError(f"array {name!r} is not stored as raw bytes of a known type")
    if len(chunks) != len(shape) or not all(type(length) is int and length >= 0 for length in [*shape, *chunks]):
        raise ValueError(f"array {name!r} has a shape that is none")
    wanted = prod(-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True))
    there = sum(key.startswith(f"{attempt}/{name}/c/") for key in blobs)
    if wanted != there:
        raise ValueError(f"array {name!r} has {there} of {wanted} chunks")


def _read_by_zarr(attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
    for name in names:
        _check_plain(attempt, blobs, name)
    import zarr
    from zarr.core.buffer import default_buffer_prototype

    make = default_buffer_prototype().buffer.from_bytes
    prefix = f"{attempt}/"
    store = zarr.storage.MemoryStore({key.removeprefix(prefix): make(blob.tobytes()) for key, blob in blobs.items()})
    group = zarr.open_group(store=store, mode="r", zarr_format=3)
    return {name: np.array(group[name][...]) for name in names}  # type: ignore[index]
