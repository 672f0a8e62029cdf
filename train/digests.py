"""Digests of a run's training clips, to detect changed data and splits that share a recording."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from vaflow.cache import Cache
from vaflow.cache.documents import canonical
from vaflow.cache.schema import LABELS, Record
from vaflow.errors import CorruptError, UsageError, count, explain

NO_MEDIA = ("labels", "targets")  # parts of a record's source that are not recordings
LISTED = 5  # clips that a message names


@dataclass(frozen=True)
class ClipDigest:
    """Digests of a clip's contents, from its records.

    Attributes:
        content: digest of all arrays that a run reads of the clip.
        media: digests of the media files that the arrays were made from.
    """

    content: str
    media: frozenset[str]


def clip_digests(cache: Cache, streams: Iterable[str], items: Iterable[str]) -> dict[str, ClipDigest]:
    """Item -> digest, from the checksums in the cache's records; no array is read.

    Args:
        cache: of the clips.
        streams: that a run reads, without the labels, which always count.
        items: clips.
    """
    names = sorted({*streams, LABELS})
    return {item: _digest([cache.record(name, item) for name in names if cache.has(name, item)]) for item in items}


def _digest(records: Sequence[Record]) -> ClipDigest:
    contents, media = {}, set()
    for record in records:
        prefix = f"{record.attempt}/"
        files = {path.removeprefix(prefix).replace(record.attempt, ""): facts for path, facts in record.files.items()}
        contents[record.stream] = {"files": files, "arrays": record.arrays, "duration": record.meta.get("duration")}
        for part, identity in record.source.items():
            if part not in NO_MEDIA and isinstance(identity, dict) and isinstance(identity.get("blake2b"), str):
                media.add(identity["blake2b"])
    return ClipDigest(blake2b(canonical(contents), digest_size=16).hexdigest(), frozenset(media))


def check_splits_apart(train: Mapping[str, ClipDigest], val: Mapping[str, ClipDigest]) -> None:
    """Refuse splits that share a recording: validation scores would be those of clips seen in training.

    Raises:
        UsageError: a clip of `train` and one of `val` were made from the same file; pairs are named.
    """
    owner = {media: item for item, clip in sorted(train.items()) for media in clip.media}
    pairs = sorted({(owner[media], item) for item, clip in val.items() for media in clip.media if media in owner})
    if pairs:
        names = ", ".join(f"{one} and {other}" for one, other in pairs[:LISTED])
        raise UsageError(
            explain(
                "The training and the validation split share recordings",
                got=f"{count(len(pairs), 'pair')} of clips made from the same file: {names}",
                remedy="Remove one clip of each pair from the cache, or allow it with --set shared_sources=true",
            )
        )


def to_json(splits: Mapping[str, Mapping[str, ClipDigest]]) -> str:
    """The file `clips.json` of a run: split -> item -> digest of its contents."""
    plain = {split: {item: clip.content for item, clip in clips.items()} for split, clips in splits.items()}
    return json.dumps(plain, indent=1) + "\n"


def from_json(text: str, name: str) -> dict[str, dict[str, str]]:
    """Read `clips.json`; `name` is the file's, for errors.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = json.loads(text)
        return {split: dict(clips) for split, clips in document.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(explain(f"{name} cannot be read", got=error)) from error


def changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, ClipDigest]]) -> list[str]:
    """Return the differences between a run's clips and a cache, one phrase per split and kind; empty if equal."""
    phrases = []
    for split in sorted({*old, *new}):
        before = old.get(split, {})
        now = {item: clip.content for item, clip in new.get(split, {}).items()}
        kinds = {
            "changed": [item for item in before if item in now and before[item] != now[item]],
            "added": [item for item in now if item not in before],
            "removed": [item for item in before if item not in now],
        }
        for kind, items in kinds.items():
            if items:
                more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
                phrases.append(f"{split}: {kind} {', '.join(sorted(items)[:LISTED])}{more}")
    return phrases
