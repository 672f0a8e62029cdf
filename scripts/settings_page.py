"""Write `docs/settings.md`, the reference of all settings, from the config dataclasses."""

from pathlib import Path

from vaflow.extract.config import ExtractConfig
from vaflow.settings import reference
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


def page() -> str:
    """The text of the page."""
    return HEAD + EXTRACT + reference(ExtractConfig) + TRAIN + reference(TrainConfig)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
