"""Prompt sets: descriptions of the nine valence-arousal regions, and their prototypes in CLIP's text space.

Region index = 3 * valence level + arousal level, levels low, middle, high. Source: arXiv 2603.13415 (templates, mean
of normalised text embeddings); the paper shows only some of the descriptions, so they are in a file that can be
edited.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders import encode_text
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    from vaflow.encoders.base import AudioEncoder, VisualEncoder

LEVELS = ("low", "middle", "high")
REGIONS = tuple((f"v_{valence}", f"a_{arousal}") for valence in LEVELS for arousal in LEVELS)  # keys of a prompt set
REGION_NAMES = tuple(f"{valence} valence, {arousal} arousal" for valence in LEVELS for arousal in LEVELS)
DEFAULT = "default"

Floats = NDArray[np.float32]


def region_table(shares: Sequence[float]) -> str:
    """Text table of the regions' shares in per cent, 31 columns: valence down (high first), arousal across (low first).

    Args:
        shares: [9] in [0, 1], by region index.
    """
    lines = ["         arousal", "valence" + "".join(f"{level:>8}" for level in LEVELS)]
    for v in reversed(range(3)):
        lines.append(f"{LEVELS[v]:>7}" + "".join(f"{share:>8.1%}" for share in shares[3 * v : 3 * v + 3]))
    return "\n".join(lines)


@dataclass(frozen=True)
class PromptSet:
    """Templates, each with one `{}`, and the nine descriptions in region order 3 * valence + arousal."""

    name: str
    templates: tuple[str, ...]
    descriptions: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Return the words as plain JSON, without the name."""
        return {"templates": list(self.templates), "descriptions": list(self.descriptions)}

    def texts(self) -> list[list[str]]:
        """Return [templates][9] filled templates."""
        return [[template.replace("{}", words) for words in self.descriptions] for template in self.templates]


def load_prompts(path: Path | None = None) -> PromptSet:
    """Read a prompt set; without a path, the built-in one, called "default".

    Raises:
        UsageError: the file is missing, not TOML, or not a prompt set (every problem is listed).
    """
    source = path if path is not None else Path(__file__).with_name("prompts.toml")
    try:
        document = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(explain(f"The prompt file {source} cannot be read", got=error, expected="TOML")) from error
    templates, descriptions = _templates(document), _descriptions(document)
    required = [f"{valence}.{arousal}" for valence, arousal in REGIONS]
    problems = [] if templates else ["no templates"]
    problems += [
        f"template {name} must be a text that contains {{}} once"
        for name, text in templates.items()
        if not isinstance(text, str) or text.count("{}") != 1
    ]
    problems += [f"description {key} is missing" for key in required if key not in descriptions]
    problems += [f"description {key} is not one of the nine regions" for key in descriptions if key not in required]
    problems += [
        f"description {key} must be a text that is not empty"
        for key, text in descriptions.items()
        if key in required and not (isinstance(text, str) and text.strip())
    ]
    problems += [f"{key} is not a table of prompt sets" for key in document if key not in ("templates", "descriptions")]
    if problems:
        raise UsageError(
            explain(
                f"The prompt file {source} is not a prompt set: {'; '.join(problems)}",
                expected="[templates] with texts that contain {} once, and [descriptions] with the nine keys "
                "v_low.a_low ... v_high.a_high (levels low, middle, high)",
                remedy="Start from a copy of the built-in prompts.toml",
            )
        )
    words = tuple(descriptions[f"{valence}.{arousal}"] for valence, arousal in REGIONS)
    return PromptSet(source.stem if path is not None else DEFAULT, tuple(templates.values()), words)


def as_toml(templates: Sequence[str], descriptions: Sequence[str]) -> str:
    """Return the text of a file that `load_prompts` reads."""
    texts = [json.dumps(text, ensure_ascii=False) for text in descriptions]
    keys = [f"{valence}.{arousal} = {text}" for (valence, arousal), text in zip(REGIONS, texts, strict=False)]
    return "\n".join([f"templates = {json.dumps(list(templates), ensure_ascii=False)}", "", "[descriptions]", *keys])


def _templates(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return templates by name, from a table or a list."""
    templates = document.get("templates", {})
    if isinstance(templates, list):
        return {str(number): text for number, text in enumerate(templates, start=1)}
    return templates if isinstance(templates, dict) else {"templates": templates}


def _descriptions(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return `v_low.a_low` -> words, from the nested tables of TOML's dotted keys."""
    table = document.get("descriptions", {})
    flat: dict[str, Any] = {}
    for valence, row in table.items() if isinstance(table, dict) else []:
        if isinstance(row, dict):
            flat |= {f"{valence}.{arousal}": words for arousal, words in row.items()}
        else:
            flat[valence] = row
    return flat


def prototypes(encoder: VisualEncoder | AudioEncoder, prompt_set: PromptSet) -> tuple[Floats, Floats]:
    """Return the nine prototypes of a prompt set.

    Returns:
        ([9, D], [templates, 9, D]) float32: the mean over templates of the normalised text embeddings (itself not
        normalised: the head normalises it), and those embeddings.

    Raises:
        UsageError: the encoder has no text tower.
    """
    texts = prompt_set.texts()
    flat = encode_text(encoder, [text for row in texts for text in row])
    template = flat.reshape(len(texts), len(REGIONS), -1).astype(np.float32)
    return template.mean(axis=0, dtype=np.float64).astype(np.float32), template
