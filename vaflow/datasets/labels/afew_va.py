"""AFEW-VA's annotation files: one JSON object per clip, whole numbers from -10 to 10 per frame."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels import text
from vaflow.datasets.labels.text import MAX_FRAME, TARGETS
from vaflow.errors import DataError

SCALE = 10.0  # the largest value a frame can have

_EXPECTED = (
    "a JSON object with 'frames': frame number -> an object with 'valence' and 'arousal', each from -10 to 10 or null"
)
_SHOWN = 20


def read_afew_va(path: Path) -> Annotation:
    """`frames[number]{valence, arousal}` -> values divided by 10; frame `number` is the picture of that number.

    Raises:
        DataError: with every problem and its frames.
    """
    problems: list[str] = []
    found: dict[int, tuple[float, ...]] = {}
    for name, entry in _frames(path).items():
        number = _number(name)
        if number is None or number in found:
            problems.append(f"{name!r} is {'not a frame number' if number is None else 'there twice'}")
        elif not isinstance(entry, dict):
            problems.append(f"frame {name} is not an object")
        else:
            found[number] = tuple(_value(entry, target, name, problems) for target in TARGETS)
    if problems:
        rest = len(problems) - _SHOWN
        shown = "; ".join(problems[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        raise text.refuse(path, _EXPECTED, shown)
    if not found:
        raise text.refuse(path, _EXPECTED, "no frames")
    frame = sorted(found)
    value = np.array([found[number] for number in frame], np.float32)
    return Annotation(value=value, frame=np.array(frame, np.int64))


def _frames(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text.read_bytes(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise text.refuse(path, _EXPECTED, f"no JSON ({error})") from error
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, dict):
        raise text.refuse(path, _EXPECTED, "JSON without an object 'frames'")
    return frames


def _number(name: str) -> int | None:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        return None
    return int(name) if int(name) <= MAX_FRAME else None


def _value(entry: dict[str, Any], target: str, name: str, problems: list[str]) -> float:
    """One label as a share of `SCALE`; NaN where there is none or it has a problem."""
    value = entry.get(target)
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = repr(value[:40]) if isinstance(value, str) else type(value).__name__
        problems.append(f"{target} of frame {name} is not a number ({got})")
    elif not -SCALE <= value <= SCALE:  # NaN fails this comparison too
        problems.append(f"{target} of frame {name} is {str(value)[:40]}, beyond [-10, 10]")
    else:
        return value / SCALE
    return np.nan
