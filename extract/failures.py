"""The clips that the last runs into a cache listed as failed."""

from dataclasses import replace
from pathlib import Path

from vaflow.cache import is_cache, open_cache
from vaflow.datasets import Dataset
from vaflow.errors import UsageError, explain
from vaflow.failures import LISTS, read_failures


def only_failed(dataset: Dataset, cache: Path) -> Dataset:
    """The data set with only those clips that the failure lists of `cache` name.

    Raises:
        UsageError: the lists name no clip of this data set.
    """
    folder = open_cache(cache).path if is_cache(cache) else cache
    failed = {failure.item for failure in read_failures(folder)}
    clips = tuple(clip for clip in dataset.clips if clip.id in failed)
    if not clips:
        raise UsageError(
            explain(
                f"No clip of {dataset.root} is listed as failed in {cache}",
                expected=f"{LISTS} that names clips of this data set",
                got=f"{len(failed)} failed items of other data" if failed else "no failed items",
            )
        )
    return replace(dataset, clips=clips)
