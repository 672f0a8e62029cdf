"""Toy streams of every kind, and their arrays, for the cache's tests."""

from pathlib import Path

import numpy as np

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import KINDS, Array, Kind, StreamInfo

DIM = 6


def stream(kind: Kind, dtype: str | None = None, name: str | None = None) -> StreamInfo:
    """A stream of `kind`, named after it."""
    dims = {"pixels": 0, "faces": 0, "crops": 0, "labels": 0, "targets": 0}
    dtypes = {"pixels": "uint8", "crops": "uint8"}
    dtypes |= dict.fromkeys(("faces", "labels", "targets", "text"), "float32")
    return StreamInfo(
        name=name or kind,
        kind=kind,
        dim=dims.get(kind, DIM),
        dtype=dtype or dtypes.get(kind, "float16"),
        identity={"encoder": f"toy-{kind}", "sampling": {"window": 10.0, "stride": 3.0}},
    )


def arrays(info: StreamInfo, length: int = 5, seed: int = 0, *, zeros: bool = False) -> dict[str, Array]:
    """Arrays that fit `info`, `length` along the first axis: random, or all zero."""
    rng = np.random.default_rng(seed)
    sizes = {"dim": info.dim, "mel": info.dim, "step": 4, "target": 2, "name": 4, "template": 3, "region": 9}
    sizes |= {"edge": 4, "point": 5, "axis": 2}
    made: dict[str, Array] = {}
    for name, spec in KINDS[info.kind].items():
        shape = tuple(sizes.get(axis, length) for axis in spec.axes)
        dtype = info.dtype if name == "embedding" else spec.dtypes[0]
        made[name] = (np.zeros(shape) if zeros else rng.uniform(-1, 1, shape)).astype(dtype)
        if dtype == "bool" and not zeros:
            made[name] = rng.random(shape) < 0.6
    if "time" in made and made["time"].ndim == 1 and not zeros:
        made["time"] = np.sort(made["time"])
    if info.kind == "targets":
        made["value"] = np.abs(made["value"])
    if info.kind in ("pixels", "crops"):
        sizes_of_images = np.zeros(length, np.int64) if zeros else rng.integers(0, 50, length)
        made["offset"] = np.concatenate([[0], np.cumsum(sizes_of_images)]).astype(np.int64)
        made["data"] = rng.integers(0, 256, made["offset"][-1]).astype(np.uint8)
    return made


def small_cache(path: Path, store: str, items: tuple[str, ...] = ("a/b", "c")) -> Cache:
    """A cache with a visual stream and labels of a few clips, alternately of train and val."""
    cache = create_cache(path, store=store)
    for kind in ("visual", "labels"):
        info = stream(kind)
        cache.declare(info)
        for number, item in enumerate(items):
            meta = {"split": ("train", "val")[number % 2]} if kind == "labels" else {}
            cache.write(kind, item, arrays(info, seed=number), meta=meta, source={"size": number})
    return cache


def assert_same(got: dict[str, Array], expected: dict[str, Array]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)
