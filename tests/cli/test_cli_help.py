"""Help pages: option values have names, commands are grouped, pages fit the terminal."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.models import CommandInfo

from vaflow.cli import app, main
from vaflow.extract.config import ExtractConfig
from vaflow.settings import settings_of
from vaflow.train.config import TrainConfig


def commands() -> list[str]:
    """Every command line that has a help page of its own, as `cache info`."""
    names = [name_of(command) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        names += [f"{group.name} {name_of(command)}" for command in group.typer_instance.registered_commands]
    return names


def name_of(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_option_values_have_names_instead_of_types(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = re.findall(r"^  (?:-\w, )?--[a-z0-9-]+(?: (\S+))?", help_of(command.split(), capsys), re.M)
    assert options
    assert not [metavar for metavar in options if metavar.startswith("<")]


@pytest.mark.parametrize("command", commands())
def test_every_command_has_an_example_and_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command.split(), capsys)
    assert f"Example: vaflow {command}" in re.sub(r"\s+", " ", text)
    assert "--verbose" in text
    assert "--quiet" in text


@pytest.mark.parametrize("command", commands())
def test_usage_has_no_braces(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "{" not in help_of(command.split(), capsys).partition("\n\n")[0]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_pages_fit_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in ([], ["train"], ["cache", "info"]):
        lines = help_of(arguments, capsys).splitlines()
        prose = [line for line in lines if len(line.split()) > 1]  # a single long word cannot be wrapped
        assert max(map(len, prose)) <= int(columns)


def test_commands_are_listed_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capsys)
    titles = ["Data and features:", "The cache:", "Training and scoring:", "Using a trained run:", "More:"]
    positions = [text.index(f"\n{title}\n") for title in titles]
    assert positions == sorted(positions)
    assert (
        text.index("\n  extract ") < positions[1] < text.index("\n  cache ") < positions[2] < text.index("\n  train ")
    )


def test_the_exit_codes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 done, 1 failed, 2 bad usage, 3 some items failed" in re.sub(r"\s+", " ", help_of([], capsys))


def test_short_help_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "-h"]) == 0
    assert capsys.readouterr().out.startswith("Usage: vaflow evaluate [OPTIONS] RUN\n")


def test_completion_offers_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("_VAFLOW_COMPLETE", "complete_bash"), ("COMP_WORDS", "vaflow e"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == ["extract", "evaluate", "ensemble", "export"]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_respected(
    no_color: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["train", "no-cache", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "vaflow:" in error
    assert ("\x1b[" in error) == (not no_color)


def test_info_lists_versions_devices_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VAFLOW_CACHE_DIR", str(tmp_path))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"vaflow", "Python", "torch", "av"} <= set(facts["Versions"])
    assert facts["Devices"]["--device auto"] in ("cpu", "cuda")
    assert facts["Folders"]["copies of remote caches"] == str(tmp_path)
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(facts["Extras"]) == set(extras)
    assert set(re.findall(r"^\| `(\w+)` \|", (root / "docs/installation.md").read_text(), re.M)) == set(extras)
    assert main(["info"]) == 0
    assert f"copies of remote caches: {tmp_path}" in capsys.readouterr().out


GENERAL = ("--help-all", "--help", "--verbose", "--quiet", "--json")


def options_of(page: str) -> list[str]:
    return [name for name in re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", page, re.M) if name not in GENERAL]


def test_train_lists_at_most_a_dozen_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert len(options_of(page)) <= 12
    headings = re.findall(r"^(\w+):$", page, re.M)
    assert headings == ["Arguments", "Data", "Model", "Optimization", "Output", "Options"]
    assert "--help-all" in page and "docs/settings.md" in page


def test_extract_lists_at_most_a_dozen_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--help"]) == 0
    page = capsys.readouterr().out
    assert len(options_of(page)) <= 12
    headings = re.findall(r"^(\w+):$", page, re.M)
    assert headings == ["Arguments", "Data", "Encoders", "Sampling", "Faces", "Hardware", "Options"]
    assert "--help-all" in page and "docs/settings.md" in page


def test_extract_help_all_lists_every_option_and_marks_experimental_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["extract", "--help-all"]) == 0
    page = capsys.readouterr().out
    for described in settings_of(ExtractConfig).values():
        assert f"  {described.option} " in page or f"  {described.option}\n" in page
    for option in ("--store", "--weights", "--shard", "--engine", "--ray-address", "--retry-failed", "--rehash"):
        assert f"  {option}" in page
    assert page.count("experimental") == 4, "--decoder nvdec, --detector torch, --compile, --image-batch auto"


def test_help_all_lists_every_option_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-all"]) == 0
    page = capsys.readouterr().out
    for name, described in settings_of(TrainConfig).items():
        assert f"  {described.option} " in page if described.option else f"  {name}=" in page
