"""Messages and help pages avoid constructions that readers stumbled over.

Covers every string literal of the product (docstrings included), the help page of every command, and names of tests
and variables. Banned are software that speaks or wants, figurative verbs, relative clauses in place of a noun, and
plurals written as "item(s)".
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaflow.cli import app, main

ROOT = Path(__file__).parents[1]
BANNED = {
    "software does not speak, want or know": (
        r"\b(says? (so|what|where|that|nothing)|say (more|only)|wants? (a|an|the|to|even)|told by|by heart|"
        r"(file|model|header|decoder|cache|run|clip|encoder)s? (says?|knows?|wants?|learned from|likes?)\b)"
    ),
    "figurative": (
        r"\b(costs? (itself|one (clip|item)|that)|gives? (a|the|it|one) \w+ up|no sign of life|signs of life|flatters?|"
        r"flattered|mend(ed|s|ing)?\b|would do\b|made anew|begin anew|for ever\b|nobody|no one\b|hunger|strangers?\b|"
        r"newcomer|passed over|go(es)? on where|goes on\b|in the place of|at hand|took the place)"
    ),
    "relative clause instead of a noun": (
        r"\b(what (is|was|were|are) (there|encoded|found|read|asked|meant|stored|drawn|said)|what there is|whatever is|"
        r"whoever|is no (time|width|pair|run|cache|number|such thing|way))\b"
    ),
    "vague noun": r"\b(no such thing|how (it|this|that) came)\b",
    "plural in brackets": r"\w\((s|es)\)",
}

ASSIGNED = re.compile(r"^ *(?:\w+, )*(?:said|told|asked|heard|ears)(?:, \w+)*(?:: [^=\n]+)? = .*", re.MULTILINE)
BANNED_IN_TEST_NAMES = (
    r"_(says?|said|told|nobody|hears?|knows?|wants?|speaks?|leads|whatever|anew|goes_on|there_is)(_|$)|"
    r"^test_what_|_(is|are)_no_"
)


def product_files() -> list[Path]:
    """Python files of vaflow, extract and train; the two links are left out."""
    files = [path for name in ("vaflow", "extract", "train") for path in (ROOT / name).rglob("*.py")]
    return sorted(path for path in files if path.relative_to(ROOT).parts[:2] not in LINKS)


LINKS = (("vaflow", "extract"), ("vaflow", "train"))


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string literal; the constant parts of f-strings are joined with `x`."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def banned_in(text: str) -> list[str]:
    """The banned constructions in a text, each as "reason: words"."""
    flat = re.sub(r"\s+", " ", text)
    return [f"{why}: {match[0]!r}" for why, words in BANNED.items() for match in re.finditer(words, flat)]


def problems_of(path: Path) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {why}" for line, text in literals(path) for why in banned_in(text)]


def commands() -> list[str]:
    names = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            names.append(f"{group.name} {command.name or getattr(command.callback, '__name__', '')}")
    return names


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_string_literals_use_plain_words(path: Path) -> None:
    assert problems_of(path) == []


@pytest.mark.parametrize("command", commands())
def test_help_pages_use_plain_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert banned_in(capsys.readouterr().out) == []


def test_variables_are_named_after_their_content() -> None:
    paths = [*product_files(), *sorted((ROOT / "tests").rglob("*.py"))]
    assert [f"{path.relative_to(ROOT)}: {line}" for path in paths for line in ASSIGNED.findall(path.read_text())] == []


def test_test_names_use_plain_words() -> None:
    names = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert [name for name in names if re.search(BANNED_IN_TEST_NAMES, name)] == []
