"""Roles of the columns of imported tables, by column name or by a mapping of the user."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vaflow.errors import UsageError, explain

ROLES = ("time", "frame", "start", "end", "valence", "arousal", "ignore")

_CLOCK_TIME = re.compile(r"(?:(\d+) days? )?(\d+):(\d\d):(\d\d(?:[.,]\d+)?)", re.ASCII)  # pandas writes "0 days ..."


@dataclass(frozen=True)
class Columns:
    """Column name in lower case -> role; a column that is not in the mapping has the role of its name."""

    roles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> "Columns":
        """Parse `--columns ROLE=NAME` options into a mapping; names may be several, separated by commas.

        Raises:
            UsageError: not such a pair, an unknown role, or a column with two roles.
        """
        roles: dict[str, str] = {}
        for pair in pairs:
            role, equals, names = pair.partition("=")
            if not equals or role not in ROLES or not names:
                expected = "ROLE=NAME, as time=frameTime"
                raise UsageError(explain("--columns is not a pair", expected=expected, got=pair, choices=ROLES))
            for name in names.lower().split(","):
                if roles.setdefault(name.strip(), role) != role:
                    raise UsageError(explain(f"--columns gives {name!r} two roles", got=pair))
        return cls(roles)

    def of(self, header: Sequence[str]) -> list[str]:
        """Column names in lower case, with mapped names replaced by their role.

        A column that has a role's name, while the mapping gives that role to another one, is ignored.
        """
        names = [name.lower() for name in header]
        mapped = {self.roles[name] for name in names if name in self.roles}
        return [self.roles.get(name, "ignore" if name in mapped else name) for name in names]


def seconds_of(cell: str) -> float:
    """Parse a time cell: seconds, "HH:MM:SS.sss", or "D days HH:MM:SS.sss".

    Raises:
        ValueError: it is none of these.
    """
    if (match := _CLOCK_TIME.fullmatch(cell)) is None:
        return float(cell)
    days, hours, minutes, rest = match.groups()
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(rest.replace(",", "."))
