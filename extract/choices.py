"""A choice of people for a cache: one rule for all clips, and rows of a table for some of them."""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vaflow.cache.documents import canonical
from vaflow.datasets.files import text_encoding
from vaflow.errors import UsageError, explain
from vaflow.extract.faces.choice import ID

EXCLUDED = "none"
RULES = re.compile(r"main|all|left|right|speaking|id:[1-9]\d*")
ROW_RULES = re.compile(r"none|main|left|right|speaking|id:[1-9]\d*")
COLUMNS = ("clip", "person")
SHOWN = 5  # clips in a message


@dataclass(frozen=True)
class Choices:
    """Who is estimated.

    Attributes:
        rule: of all clips without a row: main, all, left, right, speaking or id:K; None: the person of the cache.
        rows: clip, or with the rule "all" the item of a person -> rule, or "none" to leave it out.

    Raises:
        UsageError: there is neither a rule nor a row, or one of them is not valid.
    """

    rule: str | None = None
    rows: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule is None and not self.rows:
            raise UsageError(explain("Neither --person nor --choices is given", expected="one of them, or both"))
        if self.rule is not None and not RULES.fullmatch(self.rule):
            raise UsageError(
                explain("--person is not valid", expected="main, all, left, right, speaking or id:K", got=self.rule)
            )
        for name, rule in self.rows.items():
            if not ROW_RULES.fullmatch(rule):
                expected = "none, main, left, right, speaking or id:K"
                raise UsageError(
                    explain(f"The person of {name!r} in --choices is not valid", expected=expected, got=rule)
                )

    def identity(self, faces: Mapping[str, Any]) -> dict[str, Any]:
        """The `faces` identity of features that were made with another choice, with this choice.

        Rows that choose a person are stated by a digest; rows that leave a clip out do not change any features.
        """
        before = faces.get("choices") if self.rule is None else None
        chosen = {name: rule for name, rule in self.rows.items() if rule not in (EXCLUDED, self.rule)}
        digest = blake2b(canonical({"before": before, "rows": chosen}), digest_size=8).hexdigest() if chosen else before
        rest = {key: value for key, value in faces.items() if key != "choices"}
        return rest | {"person": self.rule or faces["person"]} | ({"choices": digest} if digest else {})

    def check(self, people: Mapping[str, int], everyone: bool) -> None:
        """Compare the choice with the clips of a cache.

        Args:
            people: clip -> number of its people.
            everyone: every person becomes an item.

        Raises:
            UsageError: a row names no clip or person, or no clip has the person of the rule.
        """
        counts = ", ".join(f"{clip} {number}" for clip, number in sorted(people.items())[:SHOWN])
        counts += ", ..." if len(people) > SHOWN else ""
        items = {f"{clip}#{k}" for clip, number in people.items() for k in range(1, number + 1)} if everyone else set()
        for name, rule in self.rows.items():
            if name not in people and name not in items:
                raise UsageError(explain("--choices names a clip that is not in the cache", got=name, choices=people))
            if everyone and rule != EXCLUDED:
                raise UsageError(
                    explain(
                        f"{name!r} has a person in --choices", expected="none, where every person is an item", got=rule
                    )
                )
            if rule.startswith(ID) and int(rule.removeprefix(ID)) > people.get(name, 0):
                raise UsageError(
                    explain(f"{name!r} has no such person", expected=f"id:1 to id:{people.get(name, 0)}", got=rule)
                )
        if self.rule is not None and self.rule.startswith(ID):
            number = int(self.rule.removeprefix(ID))
            if number > max(people.values(), default=0):
                raise UsageError(
                    explain(f"No clip has person {number}", expected=f"a number of a person; people per clip: {counts}")
                )


def read_choices(path: Path) -> dict[str, str]:
    """Read a table with the columns `clip` and `person`: clip -> rule. Rows without a person are skipped.

    Raises:
        UsageError: the file is not such a table, or names a clip twice.
        OSError: it cannot be read.
    """
    try:
        data = path.read_bytes()
        lines = data.decode(text_encoding(data)).splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(explain(f"{path} is not a table", expected="CSV in UTF-8", got=str(error))) from error
    rows = csv.DictReader(lines)
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        got = ", ".join(rows.fieldnames or ()) or "an empty file"
        raise UsageError(explain(f"{path} is not a table of choices", expected="the columns clip,person", got=got))
    return _once(path, ((row["clip"], (row["person"] or "").strip()) for row in rows))


def _once(path: Path, rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for clip, rule in rows:
        if clip in chosen:
            raise UsageError(explain(f"{path} names a clip twice", got=clip))
        if rule:
            chosen[clip] = rule
    return chosen
