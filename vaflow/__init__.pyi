from vaflow.api import Run, Table, extract, load, open_cache, train

__version__: str
__all__ = ["Run", "Table", "extract", "load", "open_cache", "train"]
