"""The documents are true: every command and code block of the README runs here, in order, in a folder of its own.

Three things stand in: the tiny encoders for those whose weights must be downloaded, a small Aff-Wild2 tree for the real
one, and one epoch for the usual number. The installation lines are what `.ci/run` runs; the demo has a test of its own.
"""

import re
import shlex
from pathlib import Path

import pytest
from affwild2_tree import build_affwild2

from vaflow.cli import main

ROOT = Path(__file__).parents[1]
STAND_INS = {
    "clip-vit-b16": "clip-tiny",
    "clip-vit-b32": "clip-tiny",
    "resnet50": "resnet-tiny",
    "ast": "ast-tiny",
    "vggish": "vggish-tiny",
    "60": "3",  # clips of the large demonstration
    "finetune_blocks=4": "finetune_blocks=2",  # the tiny encoders have no more
}
ALIASES = [word for name, other in STAND_INS.items() if "tiny" in other for word in ("--alias", f"{name}={other}")]
QUICK = {"train": ["--epochs", "1"], "ablate": ["--set", "epochs=1"]}
INSTALLS = "python3 -m venv"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def with_stand_ins(arguments: list[str]) -> list[str]:
    words = [STAND_INS.get(word, word) for word in arguments]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    if words[0] == "ablate" and "--alias" not in words:
        words += ALIASES
    return words + QUICK.get(words[0], [])


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A folder with what the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    tree = build_affwild2(folder / "affwild2", seconds=8)
    (folder / "videos").mkdir()
    (folder / "videos" / "single_face.mp4").symlink_to((clips / "single_face.mp4").resolve())
    (folder / "interview.mp4").symlink_to((clips / "obama.mp4").resolve())
    (folder / "sample.txt").write_bytes(tree.sample.read_bytes())
    return folder


def test_readme_runs_from_top_to_bottom(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sandbox)
    ran = 0
    for line in "\n".join(blocks("README.md", "bash")).splitlines():
        if line.startswith(INSTALLS) or not line.strip():
            continue
        program, *arguments = shlex.split(line)
        assert program == "vaflow", line
        code = main(with_stand_ins(arguments))
        assert code == 0, f"{line}: exit code {code}\n{capsys.readouterr().err}"
        ran += 1
    assert ran >= 17
    for code_block in blocks("README.md", "python"):
        for name, stand_in in STAND_INS.items():
            code_block = code_block.replace(f'"{name}"', f'"{stand_in}"')
        exec(compile(code_block, "README.md", "exec"), {})
    assert (sandbox / "predictions" / "interview.csv").read_text().startswith("frame,time,valence,arousal\n")
    assert (sandbox / "predictions" / "interview.png").read_bytes().startswith(b"\x89PNG")
    assert (sandbox / "ablation" / "results.html").read_text().lower().startswith("<!doctype html>")
    rows = [(sandbox / name).read_text().splitlines() for name in ("sample.txt", "submission.txt")]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    [line] = [b.strip() for b in blocks("README.md", "bash") if "'.[dev]'" in b]
    assert line in [b.strip() for b in blocks("CONTRIBUTING.md", "bash")]
    for part in line.split(" && "):
        assert part.replace("pip install -e", "pip install -q -e") in ci, part


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
