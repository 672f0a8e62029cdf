"""Settings described in field metadata: conversion, checks, `--set`, the reference page, the command's options."""

import runpy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from vaflow.cli.common import Output
from vaflow.cli.options import HelpAll, command_class, epilog, with_options
from vaflow.errors import UsageError
from vaflow.settings import check, coerce, parse_pairs, setting, settings_of
from vaflow.train.config import TrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "settings_page.py"


@dataclass(frozen=True)
class Config:
    rate: float = setting(1e-4, "Learning rate", group="speed", above=0, below=1, option="--rate", shown=True)
    wait: float = setting(300.0, "Longest wait", group="speed", unit="seconds", at_least=0, option="--longest-wait")
    batch: int = setting(0, "Images per batch", group="speed", at_least=0, words={"auto": -1}, option="--batch")
    limit: int | None = setting(None, "Largest size", group="sizes", above=0, unset="unlimited")
    names: tuple[str, ...] = setting((), "Streams", group="sizes", unset="all", option="--name")
    store: str = setting("zarr", "Store", group="sizes", choices=("zarr", "hdf5"))
    fast: bool = setting(False, "Skip the check", group="speed", option="--fast")
    file: Path | None = setting(None, "File of words", group="sizes", unset="built in", option="--file")

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("rate", "3e-4", 3e-4),
        ("batch", "auto", -1),
        ("batch", "12", 12),
        ("limit", "none", None),
        ("limit", 3, 3),
        ("names", "a, b", ("a", "b")),
        ("fast", "True", True),
        ("file", "a/b", Path("a/b")),
    ],
)
def test_values_are_converted(key: str, raw: object, value: object) -> None:
    result = coerce(Config, key, raw)
    assert result == value and type(result) is type(value)
    assert coerce(Config, key, settings_of(Config)[key].text(value)) == value


@pytest.mark.parametrize(
    ("key", "raw", "message"),
    [
        ("rate", "fast", r"^--rate must be a number > 0 and < 1 \(got 'fast'\)\.$"),
        ("batch", "some", r"^--batch must be an integer >= 0 or auto \(got 'some'\)\.$"),
        ("limit", "1.5", r"^limit must be an integer > 0 or none \(got '1.5'\)\.$"),
        ("stoer", "zarr", "Did you mean 'store'"),
    ],
)
def test_values_of_another_type_are_rejected(key: str, raw: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        coerce(Config, key, raw)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wait": -3.0}, r"^--longest-wait must be a number >= 0 seconds \(got -3.0\)\.$"),
        ({"rate": 1.0}, "--rate must be a number > 0 and < 1"),
        ({"rate": float("nan")}, "--rate"),
        ({"wait": float("inf")}, "--longest-wait"),
        ({"batch": -2}, "--batch"),
        ({"store": "hdf"}, "Did you mean 'hdf5'"),
    ],
)
def test_out_of_range_values_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Config(), **values)


def test_set_accepts_key_value_pairs() -> None:
    assert parse_pairs(Config, ["rate=0.5", "names=a=b"]) == {"rate": 0.5, "names": ("a=b",)}
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_pairs(Config, ["rate"])


def make_command(received: list[dict[str, Any]]) -> typer.Typer:
    def run(
        output: Output,
        source: Annotated[str, typer.Argument(metavar="SOURCE")],
        options: dict[str, Any],
        help_all: HelpAll = False,
    ) -> int:
        """Invoke the command."""
        received.append(options)
        return 0

    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command("run", cls=command_class(Config), epilog=epilog(Config, "the page"))(with_options(run, Config))
    return app


def test_a_command_receives_only_given_options() -> None:
    received: list[dict[str, Any]] = []
    arguments = ["here", "--rate", "0.5", "--name", "a", "--name", "b", "--batch", "auto", "--fast"]
    assert CliRunner().invoke(make_command(received), arguments).exit_code == 0
    assert received == [{"rate": 0.5, "names": ("a", "b"), "batch": -1, "fast": True}]


def test_help_shows_few_options_and_help_all_the_rest() -> None:
    short = CliRunner().invoke(make_command([]), ["--help"]).output
    assert "--rate X" in short and "--longest-wait" not in short and "the page" in short
    whole = CliRunner().invoke(make_command([]), ["--help-all"]).output
    assert "--longest-wait SECONDS" in whole and "[unlimited]" in whole and "store=NAME" in whole


def test_the_reference_has_every_setting() -> None:
    table = runpy.run_path(str(SCRIPT))["reference"](Config)
    assert "### Speed" in table and "| `wait`, `--longest-wait` | 300 | a number >= 0 (seconds) |" in table


def test_every_training_setting_is_described() -> None:
    assert list(settings_of(TrainConfig)) == [item.name for item in fields(TrainConfig)]
    for described in settings_of(TrainConfig).values():
        assert described.help[0].isupper() and not described.help.endswith("."), described.name


def test_the_settings_page_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text("utf-8") == script["page"](), "run python scripts/settings_page.py"
