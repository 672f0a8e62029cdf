"""vaflow: valence and arousal from video with speech, in two stages with a feature cache between them.

    import vaflow

    run = vaflow.load("runs/full")
    frames = run.predict("clip.mp4")

The functions are those of `vaflow.api`, imported on first use: importing vaflow imports neither torch nor NumPy.
`vaflow.extract` and `vaflow.train` are packages that can also be called. `__init__.pyi` has the types.
"""

import importlib
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "Table", "extract", "load", "open_cache", "train"]


class _CallablePackage(ModuleType):
    """A package whose call is the function of the same name in `vaflow.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        api = importlib.import_module("vaflow.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


for _name in ("extract", "train"):  # empty packages: this imports none of their modules
    importlib.import_module(f"vaflow.{_name}").__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("vaflow.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
