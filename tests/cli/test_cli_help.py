"""Help pages speak to people: options name what they take, not the type of a Python value."""

import re

import pytest
from typer.models import CommandInfo

from vaflow.cli import app, main


def commands() -> list[str]:
    found = [name_of(command) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found += [f"{group.name} {name_of(command)}" for command in group.typer_instance.registered_commands]
    return found


def name_of(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))


@pytest.mark.parametrize("command", commands())
def test_options_name_what_they_take(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    told = capsys.readouterr().out.split("Options:\n")[1]
    options = re.findall(r"^  (?:-\w, )?--[a-z0-9-]+(?: (\S+))?", told, re.M)
    assert options
    assert not [metavar for metavar in options if metavar.startswith("<")]
