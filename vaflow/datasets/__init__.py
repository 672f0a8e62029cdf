"""Folders on disk -> clips: one file per layout, and the readers of their labels."""

from vaflow.datasets.clip import SPLITS, Annotation, Clip, Dataset, Note
from vaflow.datasets.layouts import LAYOUTS, Layout, open_dataset

__all__ = ["LAYOUTS", "SPLITS", "Annotation", "Clip", "Dataset", "Layout", "Note", "open_dataset"]
