"""Lines that the commands print fit the terminal."""

import io
import logging

import pytest

from vaflow.cli import main
from vaflow.cli.ablate import terminal_text
from vaflow.cli.common import Output, loading, wrap_on_terminal
from vaflow.encoders.prompts import LEVELS, region_table
from vaflow.errors import explain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[40, 80])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("NO_COLOR", "1")
    return int(request.param)


def test_an_error_is_divided_between_words(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["cache", "info", "no-such-cache"]) == 2
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 1 and all(len(line) <= columns or "vaflow extract" in line for line in lines)
    assert " ".join(line.strip() for line in lines).startswith("vaflow: ")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train", "--a-misspelled-option"], "No such option: --a-misspelled-option"),
        (["train"], "Missing argument 'CACHE'."),
        (["folds", "cache", "--folds", "several"], "Invalid value for '--folds': Input should be a valid integer"),
        (["cache", "unknown-subcommand"], "No such command 'unknown-subcommand'."),
    ],
)
def test_a_usage_error_is_divided_between_words(
    arguments: list[str], problem: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(arguments) == 2
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert f"Error: {problem}" in " ".join(line.strip() for line in lines)
    assert lines[0].startswith("Usage: vaflow ")


def test_help_without_arguments_keeps_bold_headings_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["cache"]) == 2
    assert "\x1b[1mCommands\x1b[0m" in terminal.getvalue()


def test_system_errors_are_shown_without_their_number() -> None:
    assert explain("Cannot read x.csv", got=FileNotFoundError(2, "No such file", "x.csv")).endswith(
        "Got: No such file."
    )
    assert explain("Cannot write", got=OSError(28, "No space left", "y")).endswith("Got: No space left: y.")


def test_the_tables_of_a_markdown_document_are_aligned() -> None:
    text = terminal_text("# Encoders\n\n| stream | MB |\n| --- | --- |\n| clip-tiny | 0.04 |\n\nAfter it.\n")
    assert text == "Encoders\n\nstream       MB\n---------  ----\nclip-tiny  0.04\n\nAfter it.\n"


def test_log_lines_are_divided_between_words(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    Output().set_up()
    logging.getLogger("vaflow").info("%s", "word " * 30)
    assert max(map(len, terminal.getvalue().splitlines())) <= columns


@pytest.mark.parametrize(
    "text", ["Add them with `{}` now.", "Add them: {}, or train without.", "Add them: {}.", "It has none. {}; or none."]
)
def test_a_command_stays_on_one_line(text: str, columns: int) -> None:
    command = "vaflow cache prompts CACHE --prompts emotions.toml"
    wrapped = wrap_on_terminal("The cache has no such prompts yet. " + text.format(command), stream=Terminal())
    assert command in wrapped and "\n" in wrapped


def test_a_python_command_stays_on_one_line(columns: int) -> None:
    command = 'python -c "from transformers import AutoModel as M; M.from_pretrained(1).save_pretrained(2)"'
    assert command in wrap_on_terminal(f"If you trust the files, convert them: {command}.", stream=Terminal())


def test_output_that_is_piped_is_not_divided(columns: int) -> None:
    text = "word " * 40 + "end"
    assert wrap_on_terminal(text, stream=io.StringIO()) == text


def test_the_table_of_regions_fits_40_columns() -> None:
    lines = region_table([1.0] * 9).splitlines()
    assert max(map(len, lines)) <= 38
    assert lines[1].split() == ["valence", *LEVELS] and [line.split()[0] for line in lines[2:]] == [*reversed(LEVELS)]


def test_log_lines_do_not_share_a_line_with_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    Output().set_up()
    with tqdm(total=2, desc="extract", file=terminal) as bar:
        bar.refresh()
        logging.getLogger("vaflow").warning("clip failed")
    assert "clip failed" in terminal.getvalue().replace("\r", "\n").split("\n")


def test_a_spinner_shows_while_libraries_are_imported_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with loading(Output()):
        time.sleep(0.5)
    assert "loading libraries" in terminal.getvalue() and terminal.getvalue().endswith("\r\x1b[K")
    quiet = Terminal()
    monkeypatch.setattr("sys.stderr", quiet)
    with loading(Output(json=False, verbose=False, quiet=True)):
        time.sleep(0.4)
    assert quiet.getvalue() == ""


def test_usage_lines_have_single_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "-h"]) == 0
    assert "vaflow predict [OPTIONS] RUN [MEDIA]...\n" in capsys.readouterr().out
