"""Folders on disk -> clips: one file per layout, each with the reader of its labels."""

from vaflow.datasets.clip import SPLITS, Annotation, Clip, Dataset, Note
from vaflow.datasets.formats import LAYOUTS, Layout, log_left_out, open_dataset

__all__ = ["LAYOUTS", "SPLITS", "Annotation", "Clip", "Dataset", "Layout", "Note", "log_left_out", "open_dataset"]
