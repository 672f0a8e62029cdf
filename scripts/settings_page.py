"""Write `docs/settings.md`, the reference of all settings, from the config dataclasses."""

from pathlib import Path

from vaflow.extract.config import ExtractConfig
from vaflow.settings import settings_of
from vaflow.train.config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Written by `python scripts/settings_page.py` from the descriptions in the code; do not edit this page.
"""
TRAIN = """
## vaflow train

Pass a setting as its option, as `--set KEY=VALUE`, or as `KEY = VALUE` in a TOML file for `--config`. A run's
`config.toml` stores them all as they were resolved. `none` stands for no value.

"""
EXTRACT = """
## vaflow extract

Pass a setting as its option. All but those of the group Hardware are part of the streams' fingerprints.

"""


def reference(config: type) -> str:
    """The settings of a config dataclass as Markdown: a heading and a table per group."""
    parts: dict[str, list[str]] = {}
    for described in settings_of(config).values():
        name = f"`{described.name}`" + (f", `{described.option}`" if described.option else "")
        values = described.values + (f" ({described.unit})" if described.unit else "")
        source = f" Source: {described.source}." if described.source else ""
        cells = (name, described.default_text, values, f"{described.help}.{source}")
        parts.setdefault(described.group, []).append(f"| {' | '.join(cells)} |")
    head = "| setting, option | default | values | meaning |\n|---|---|---|---|\n"
    return "\n".join(f"### {group.capitalize()}\n\n{head}{chr(10).join(rows)}\n" for group, rows in parts.items())


def page() -> str:
    """The text of the page."""
    return HEAD + EXTRACT + reference(ExtractConfig) + TRAIN + reference(TrainConfig)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
