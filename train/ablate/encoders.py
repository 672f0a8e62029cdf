"""Table `encoders`: the same heads on every stream of a cache, every pair of streams, and all visual streams together.

The table is written as the TOML of any other table, so that `tables.toml` of the study repeats it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaflow.cache import Cache
from vaflow.cache.schema import stored_layers
from vaflow.errors import UsageError, explain
from vaflow.files import write_file
from vaflow.train.ablate.grid import Study, parse_study
from vaflow.train.ablate.results import Results
from vaflow.train.config import NONE

NAME = "encoders"


def encoder_study(cache: Cache, preset: str = "p1") -> Study:
    """Return the study of a cache's streams; its full model has the first visual and the first audio stream.

    Raises:
        UsageError: the cache has no stream of an encoder.
    """
    visual, audio = _streams(cache, "visual"), _streams(cache, "audio")
    if not visual and not audio:
        raise UsageError(explain(f"{cache.place} has no encoder's stream", expected="a visual or an audio stream"))
    lines = ["[base]", f"preset = {json.dumps(preset)}", *_choice(visual[:1], audio[:1]), ""]
    lines += [f"[table.{NAME}]", 'title = "Encoders of the cache"', ""]
    for name, rows in _rows(visual, audio):
        lines += [f"[[table.{NAME}.row]]", f"name = {json.dumps(name)}", *rows, ""]
    return parse_study("\n".join(lines), f"table {NAME}")


def _streams(cache: Cache, kind: str) -> list[str]:
    return [name for name, info in cache.streams().items() if info.kind == kind]


def _choice(visual: Sequence[str], audio: Sequence[str]) -> list[str]:
    return [f"visual = {json.dumps(list(visual) or [NONE])}", f"audio = {json.dumps(list(audio) or [NONE])}"]


def _rows(visual: Sequence[str], audio: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for name in visual:
        yield name, _choice([name], [])
    for name in audio:
        yield name, _choice([], [name])
    for one in visual:
        for other in audio:
            yield f"{one} + {other}", _choice([one], [other])
    if len(visual) > 1:
        yield "all visual", _choice(visual, [])


def write_matrix(cache: Cache, results: Results, path: Path) -> Path:
    """Write the mean CCC of every pair as a matrix, and the size of every stream, as Markdown."""
    rows = {row.entry.row.name: row for table in results.tables for row in table.rows}

    def score(name: str) -> str:
        row = rows.get(name)
        return f"{row.mean[2]:.3f}" if row is not None and row.seeds else "-"

    visual, audio = _streams(cache, "visual"), _streams(cache, "audio")
    lines = ["# Encoders of the cache", "", "Mean CCC over seeds; intervals and paired tests are in results.md.", ""]
    lines += ["| visual \\ audio | none | " + " | ".join(audio) + " |", "|---" * (len(audio) + 2) + "|"]
    for one in visual:
        cells = [score(one), *(score(f"{one} + {other}") for other in audio)]
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    lines.append("| none | - | " + " | ".join(score(other) for other in audio) + " |")
    if len(visual) > 1:
        lines += ["", f"All visual streams together: {score('all visual')}."]
    lines += ["", "| stream | dimensions | layers | MB |", "|---|---|---|---|"]
    sizes = cache.info()["streams"]
    for name, info in cache.streams().items():
        if info.kind in ("visual", "audio"):
            size = sizes[name]["bytes"] / 1e6
            lines.append(f"| {name} | {info.dim} | {stored_layers(info) or 1} | {size:.1f} |")
    write_file(path, "\n".join(lines) + "\n")
    return path
