"""Everything that is committed in a cache, record by record, and what is damaged."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from vaflow.cache.cache import Cache
from vaflow.cache.commit import load_record
from vaflow.cache.failures import ItemFailure
from vaflow.cache.names import escape
from vaflow.cache.schema import LABELS, Json
from vaflow.cache.verify import load_streams
from vaflow.errors import explain

Key = tuple[str, str]  # stream, item


@dataclass(frozen=True)
class Brief:
    """What is remembered of a record while items are chosen: what it was made from, when, and a clip's split."""

    source: Json
    created: str
    split: str | None


@dataclass(frozen=True)
class Survey:
    """Every committed item of a cache by stream and item, and what cannot be used."""

    briefs: dict[Key, Brief]
    damaged: list[ItemFailure]

    @property
    def splits(self) -> dict[str, str | None]:
        """Clip -> split."""
        return {item: brief.split for (stream, item), brief in self.briefs.items() if stream == LABELS}


def survey(cache: Cache, stage: str) -> Survey:
    """Read all records. Those that cannot be read, or whose stream's file is lost, are failures of `stage`."""
    layout = cache.layout
    streams, _ = load_streams(layout)
    found = Survey({}, [])
    for folder in sorted(p for p in layout.all_records.glob("*") if p.is_dir()):
        for path in sorted(p for p in folder.glob("*.json") if not p.name.startswith(".")):
            try:
                record = load_record(layout, path)
                if streams.get(f"{folder.name}.json") is None:
                    raise ValueError(f"streams/{folder.name}.json, which says what made its stream, is lost or damaged")
            except FileNotFoundError:  # dropped since it was listed
                continue
            except (OSError, ValueError) as error:
                found.damaged.append(_failure(cache, path, stage, str(error)))
                continue
            split = record.meta.get("split") if record.stream == LABELS else None
            found.briefs[record.stream, record.item] = Brief(record.source, record.created, split)
    return found


def _failure(cache: Cache, path: Path, stage: str, problem: str) -> ItemFailure:
    message = explain(
        f"{cache.layout.shown(path)} of the cache {cache.place} cannot be used: {problem}",
        remedy=f"Run `vaflow cache repair {cache.place}`, and extract again",
    )
    return ItemFailure(_name_of(path.stem), _name_of(path.parent.name), stage, "CorruptError", message)


def _name_of(file_name: str) -> str:
    """The name that a file name was made of, where that can be told."""
    name = unquote(file_name, errors="surrogatepass")
    return name if name and escape(name) == file_name else file_name
