"""The documents are true: every command and code block of the README runs here, in order, in a folder of its own.

Two things stand in: the tiny encoders for those whose weights must be downloaded, and a small Aff-Wild2 tree for the
real one. The installation lines are what `.ci/run` runs; the demo has a test of its own.
"""

import re
import shlex
from pathlib import Path

import pytest
from affwild2_tree import build_affwild2

from vaflow.cli import main

ROOT = Path(__file__).parents[1]
STAND_INS = {"clip-vit-b16": "clip-tiny", "ast": "ast-tiny"}
INSTALLS = "python3 -m venv"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def with_stand_ins(word: str) -> str:
    return STAND_INS.get(word, word)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A folder with what the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    build_affwild2(folder / "affwild2", seconds=8)
    (folder / "videos").mkdir()
    (folder / "videos" / "single_face.mp4").symlink_to((clips / "single_face.mp4").resolve())
    (folder / "interview.mp4").symlink_to((clips / "obama.mp4").resolve())
    return folder


def test_readme_runs_from_top_to_bottom(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sandbox)
    ran = 0
    for line in "\n".join(blocks("README.md", "bash")).splitlines():
        if line.startswith(INSTALLS) or not line.strip():
            continue
        program, *arguments = [with_stand_ins(word) for word in shlex.split(line)]
        assert program == "vaflow", line
        code = main(arguments)
        assert code == 0, f"{line}: exit code {code}\n{capsys.readouterr().err}"
        ran += 1
    assert ran >= 7
    for code_block in blocks("README.md", "python"):
        for name, stand_in in STAND_INS.items():
            code_block = code_block.replace(f'"{name}"', f'"{stand_in}"')
        exec(compile(code_block, "README.md", "exec"), {})
    assert (sandbox / "predictions" / "interview.csv").read_text().startswith("frame,time,valence,arousal\n")
    assert (sandbox / "predictions" / "interview.png").read_bytes().startswith(b"\x89PNG")


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    [line] = [b.strip() for b in blocks("README.md", "bash") if "'.[dev]'" in b]
    assert line in [b.strip() for b in blocks("CONTRIBUTING.md", "bash")]
    for part in line.split(" && "):
        assert part.replace("pip install -e", "pip install -q -e") in ci, part


@pytest.mark.parametrize(
    "command",
    ["check", "extract", "train", "evaluate", "predict", "demo", "cache info", "cache verify", "cache repair"],
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: vaflow {command}" in re.sub(r"\s+", " ", text)
    for option in ("--verbose", "--quiet"):
        assert option in text


def test_top_level_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from vaflow.cli import main; code = main(['--help']); print(sorted(sys.modules)); sys.exit(code)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for command in ("check", "extract", "cache", "train", "evaluate", "predict", "demo"):
        assert f"\n  {command} " in said
    for heavy in ("'torch'", "'numpy'", "'av'", "'cv2'", "'open_clip'", "'transformers'", "'zarr'", "'matplotlib'"):
        assert heavy not in said, f"`vaflow --help` imports {heavy}"
