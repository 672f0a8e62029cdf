"""The tests and commands named in `docs/reliability.md` exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@cache
def functions_of(path: str) -> frozenset[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_documented_test_exists(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    assert name in functions_of(path) if name else any(test.startswith("test_") for test in functions_of(path))


def test_every_guarantee_has_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "::" not in line and ".py`" not in line]
    allowed = (
        "| guarantee |",
        "| fault |",
        "| difference between",
        "| float16 storage",
        "| bfloat16 encoders",
        "| for comparison",
    )
    assert [row for row in rows if not row.startswith(allowed)] == []
    assert len(NAMED) > 50


def test_documented_scripts_have_their_documented_options() -> None:
    for line in re.findall(r"^python (scripts/\w+\.py)(.*)$", PAGE, flags=re.MULTILINE):
        script = (ROOT / line[0]).read_text()
        for option in re.findall(r"--\w+", line[1]):
            assert f'"{option}"' in script, f"{line[0]} has no {option}"
        for word in re.findall(r" (kills|flips)\b", line[1]):
            assert f'"{word}"' in script
