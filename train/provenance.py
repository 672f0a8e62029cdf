"""What predictions were made from, written beside them: `sources.json` in the folder of the CSVs.

A run's folder and its cache can change later; this file says what they were. `vaflow trace` compares.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaflow import __version__
from vaflow.cache import Cache, address
from vaflow.cache.documents import canonical, fingerprint, now
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, Record
from vaflow.errors import CorruptError, explain
from vaflow.train.storage import write_whole

if TYPE_CHECKING:
    from vaflow.train.runs import RunRecord

SOURCES_FILE = "sources.json"


@dataclass(frozen=True)
class ItemSources:
    """What one prediction was made from.

    Attributes:
        csv: digest of the prediction's CSV.
        records: stream -> {"attempt", "created", "vaflow", "source"} of what was read of the clip.
        media: where the clip's video was, where the command was given one.
    """

    csv: str
    records: Mapping[str, Mapping[str, Any]]
    media: str | None = None


@dataclass(frozen=True)
class PredictionSources:
    """What the predictions in one folder were made from.

    Attributes:
        made: when; vaflow: by which version.
        run: its folder; settings: digest of its settings; weights: file below the run -> digest.
        cache, store: where features were read.
        streams: name -> {"kind", "fingerprint", "identity"}.
        items: clip -> what its prediction was made from.
    """

    made: str
    vaflow: str
    run: str
    settings: str
    weights: Mapping[str, str]
    cache: str
    store: str
    streams: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, ItemSources] = field(default_factory=dict)


def digest(path: Path) -> str:
    """BLAKE2b (16 bytes) of a file, in hexadecimal, as sources in a cache have it. Raises OSError."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def settings_digest(record: "RunRecord") -> str:
    """BLAKE2b (16 bytes) of a run's settings."""
    return blake2b(canonical(record.config.as_dict()), digest_size=16).hexdigest()


def weights_digests(run: Path) -> dict[str, str]:
    """File below the run's folder -> digest, for all that predictions depend on but the settings."""
    files = sorted([*run.glob("model*.safetensors"), *run.glob("encoders/**/*"), *run.glob("smoothing.json")])
    return {path.relative_to(run).as_posix(): digest(path) for path in files if path.is_file()}


def write_sources(
    folder: Path,
    run: Path,
    record: "RunRecord",
    cache: Cache,
    items: Iterable[str],
    media: Mapping[str, Path] | None = None,
) -> None:
    """Write `sources.json` for the predictions in `folder`.

    Args:
        folder: holds `<item>.csv` of every item.
        run: the run's folder; record: what its `config.toml` says.
        cache: what the features were read from.
        items: the clips.
        media: where the clips' videos are, where that is known.

    Raises:
        VaflowError: the disk refuses.
    """
    known = cache.streams()
    names = [name for name in _read_streams(record) if name in known]
    found = PredictionSources(
        made=now(),
        vaflow=__version__,
        run=str(run.resolve()),
        settings=settings_digest(record),
        weights=weights_digests(run),
        cache=address(cache.place),
        store=cache.store,
        streams={
            name: {"kind": known[name].kind, "fingerprint": fingerprint(known[name]), "identity": known[name].identity}
            for name in names
        },
        items={item: _item(folder, cache, names, item, (media or {}).get(item)) for item in items},
    )
    write_whole(folder / SOURCES_FILE, (json.dumps(found, default=vars, indent=1) + "\n").encode())


def _read_streams(record: "RunRecord") -> list[str]:
    """What a prediction is made from; a fine-tuned run reads what its own encoders take."""
    names = [stream.name for stream in record.streams]
    return [*names, *([PIXELS, LOGMEL] if record.tuned else []), LABELS]


def _item(folder: Path, cache: Cache, names: Iterable[str], item: str, media: Path | None) -> ItemSources:
    records = {name: facts_of(cache.record(name, item)) for name in names if cache.has(name, item)}
    return ItemSources(digest(folder / f"{item}.csv"), records, None if media is None else str(media.absolute()))


def facts_of(record: Record) -> dict[str, Any]:
    """The part of a record that says what an item was made from, when and by which version."""
    return {
        "attempt": record.attempt,
        "created": record.created,
        "vaflow": record.meta.get("vaflow"),
        "source": record.source,
    }


def read_sources(folder: Path) -> PredictionSources | None:
    """What `write_sources` wrote; None where there is no such file.

    Raises:
        CorruptError: it is damaged.
    """
    path = folder / SOURCES_FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        items = {item: ItemSources(**facts) for item, facts in document.pop("items").items()}
        return PredictionSources(**document, items=items)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(explain(f"{path} cannot be read", got=error)) from error


def prediction_folders(run: Path) -> Iterator[Path]:
    """Folders of predictions of a run: one per split."""
    yield from sorted(path for path in (run / "predictions").glob("*") if path.is_dir())
