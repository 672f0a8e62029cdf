"""Encoders with seeded random weights, whose results demonstrate the software and measure nothing."""

from collections.abc import Iterable

TINY = "-tiny"  # ends their names


def random_encoders(streams: Iterable[str]) -> list[str]:
    """The streams whose encoders have seeded random weights, each once."""
    return list(dict.fromkeys(name for name in streams if name.endswith(TINY)))


def demonstration_notice(streams: Iterable[str]) -> str:
    """One line for pictures and logs about encoders with random weights; empty if none has."""
    names = random_encoders(streams)
    return f"Demonstration: encoders with seeded random weights ({', '.join(names)})" if names else ""
