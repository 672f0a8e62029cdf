"""Table `encoders`: the same heads on every stream of a cache, every pair of streams, and all visual streams together.

The table is written as the TOML of any other table, so that `tables.toml` of the study repeats it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vaflow.cache import Cache
from vaflow.cache.costs import stream_costs
from vaflow.cache.schema import stored_layers
from vaflow.errors import UsageError, explain
from vaflow.train.ablate.grid import Study, parse_study
from vaflow.train.ablate.results import Results
from vaflow.train.config import NONE

NAME = "encoders"
COSTS = ("stream", "dimensions", "layers", "MB", "parameters (M)", "s per minute", "device", "precision")
COSTS_NOTE = "s per minute: seconds of encoding per minute of video, without decoding. -: not recorded."


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
    rows = {name: _choice([name], []) for name in visual} | {name: _choice([], [name]) for name in audio}
    rows |= {f"{one} + {other}": _choice([one], [other]) for one in visual for other in audio}
    if len(visual) > 1:
        rows["all visual"] = _choice(visual, [])
    for name, settings in rows.items():
        lines += [f"[[table.{NAME}.row]]", f"name = {json.dumps(name)}", *settings, ""]
    return parse_study("\n".join(lines), f"table {NAME}")


def _streams(cache: Cache, kind: str) -> list[str]:
    return [name for name, info in cache.streams().items() if info.kind == kind]


def _choice(visual: Sequence[str], audio: Sequence[str]) -> list[str]:
    return [f"visual = {json.dumps(list(visual) or [NONE])}", f"audio = {json.dumps(list(audio) or [NONE])}"]


@dataclass(frozen=True)
class Comparison:
    """Comparison of a cache's encoders, as texts.

    Attributes:
        heads: columns of the matrix; rows: its rows: mean CCC of visual streams (rows) with audio streams (columns).
        together: mean CCC of all visual streams together; "" with fewer than two.
        costs: rows of the table of costs, whose columns are `COSTS`.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    together: str
    costs: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Text of `encoders.md`."""
        lines = [
            "# Encoders of the cache",
            "",
            "Mean CCC over seeds; intervals and paired tests are in results.md.",
            "",
        ]
        lines += _table(self.heads, self.rows)
        if self.together:
            lines += ["", f"All visual streams together: {self.together}."]
        return "\n".join([*lines, "", *_table(COSTS, self.costs), "", COSTS_NOTE, ""])


def compare(cache: Cache, results: Results) -> Comparison | None:
    """Return the comparison of a study with the table `encoders`; None for other studies."""
    if all(table.table.name != NAME for table in results.tables):
        return None
    rows = {row.entry.row.name: row for table in results.tables for row in table.rows}

    def score(name: str) -> str:
        row = rows.get(name)
        return f"{row.mean[2]:.3f}" if row is not None and row.seeds else "-"

    visual, audio = _streams(cache, "visual"), _streams(cache, "audio")
    matrix = [[one, score(one), *(score(f"{one} + {other}") for other in audio)] for one in visual]
    matrix.append(["none", "-", *(score(other) for other in audio)])
    sizes, costs, table = cache.info()["streams"], stream_costs(cache), []
    for name in (*visual, *audio):
        info, cost = cache.streams()[name], costs.get(name)
        size = [str(info.dim), str(stored_layers(info) or 1), f"{sizes[name]['bytes'] / 1e6:.3g}"]
        if cost is None:
            table.append([name, *size, *"----"])
        else:
            parameters = "-" if cost.parameters is None else f"{cost.parameters / 1e6:.1f}"
            table.append([name, *size, parameters, f"{cost.seconds_per_minute:.2f}", cost.device, cost.precision])
    heads = ["visual \\ audio", "none", *audio]
    return Comparison(heads, matrix, score("all visual") if len(visual) > 1 else "", table)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
