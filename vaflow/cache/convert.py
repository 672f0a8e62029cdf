"""A cache in another store: the same arrays, sources and fingerprints."""

from vaflow.cache.cache import Cache
from vaflow.cache.opening import PathLike, create_cache, layout_of
from vaflow.cache.survey import survey
from vaflow.cache.transfer import Job, TransferSummary, transfer
from vaflow.cache.verify import load_streams
from vaflow.errors import UsageError, explain

STAGE = "convert"


def convert(source: Cache, out: PathLike, store: str, *, show_progress: bool = False) -> TransferSummary:
    """Copy a cache into one of another store, or go on with that. Damaged items are listed; the others go on.

    An item that was made anew in `source` since takes the place of its copy; one that was dropped there stays.

    Raises:
        UsageError: there is no such store, or `out` cannot be written, has another store, or lies in `source`.
        SchemaError: `out` holds something that is no cache.
        FingerprintError: `out` has a stream of the same name that was made with other settings.
        CacheError: the disk refuses; the same call goes on later.
    """
    refuse_inside(source, out)
    target = create_cache(out, store=store)
    declare_streams(target, source)
    found = survey(source, STAGE)
    jobs = [Job(key, (source,)) for key in found.briefs]
    return transfer(target, [source], jobs, found.damaged, found.splits, STAGE, show_progress=show_progress)


def refuse_inside(source: Cache, out: PathLike) -> None:
    """Nothing is written into a cache that is being read.

    Raises:
        UsageError: `out` is `source`, or lies in it.
    """
    target = layout_of(out)
    if target.remote is not None:
        inside = f"{target.place}/".startswith(f"{source.place}/")
    else:
        place = target.root.resolve()
        inside = source.path.resolve() in (place, *place.parents)
    if inside:
        problem = f"{out} is the cache that is read, or lies in it"
        raise UsageError(explain(problem, expected="another folder", remedy="Choose another folder to write"))


def declare_streams(target: Cache, source: Cache) -> None:
    """Every stream of `source` whose file is whole becomes one of `target`; raises as `Cache.declare`."""
    for info in load_streams(source.layout)[0].values():
        if info is not None:
            target.declare(info)
