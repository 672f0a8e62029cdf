"""The documentation is correct: every `bash` command and `python` block of the pages runs here, in order.

Stand-ins: tiny encoders for those whose weights must be downloaded, a small Aff-Wild2 tree for the real one, and one
epoch for the usual number. The demo and the installation are tested elsewhere; options.md, clusters.md, viewer.md and
own-features.md have tests of their own. `console` blocks need what tests do not have (weights of a hub, a cluster, a
package index, placeholders): their commands are parsed, with every option and value.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from affwild2_tree import build_affwild2

import vaflow
from vaflow.cli import app, main
from vaflow.demo import write_demo

ROOT = Path(__file__).parents[1]
STAND_INS = {
    "clip-vit-b16": "clip-tiny",
    "clip-vit-b32": "clip-tiny",
    "resnet50": "resnet-tiny",
    "ast": "ast-tiny",
    "vggish": "vggish-tiny",
    "finetune_blocks=4": "finetune_blocks=2",  # the tiny encoders have only these
}
ALIASES = [word for name, other in STAND_INS.items() if "tiny" in other for word in ("--alias", f"{name}={other}")]
QUICK = {
    "train": ["--epochs", "1"],
    "ablate": ["--set", "epochs=1"],
    "search": ["--trials", "2", "--folds", "2"],
}
TESTED_ELSEWHERE = ("python3 -m venv", "vaflow demo")  # .ci/run installs; tests/demo runs the demo
PAGES = (
    "README.md",
    "docs/search.md",
    *(
        f"docs/{name}.md"
        for name in (
            "provenance",
            "export",
            "tutorial",
            "own-data",
            "encoders",
            "fine-tuning",
            "read-elsewhere",
            "large-inputs",
            "uncertainty",
        )
    ),
    "docs/python.md",
)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Lines of the `bash` blocks, without those that have a test of their own."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line.strip() and not line.startswith(TESTED_ELSEWHERE)]


def with_stand_ins(arguments: list[str]) -> list[str]:
    words = [STAND_INS.get(word, word) for word in arguments]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    if words[0] == "ablate" and "--alias" not in words:
        words += ALIASES
    return words + QUICK.get(words[0], [])


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A folder with the inputs that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    tree = build_affwild2(folder / "affwild2", seconds=4)
    (folder / "videos").mkdir()
    for split, name in (("train", "single_face"), ("val", "carphone")):
        (folder / "videos" / f"{name}.mp4").symlink_to((clips / f"{name}.mp4").resolve())
        rows = [f"{k / 25},{k % 40 / 80},{k % 25 / 50 - 0.3}" for k in range(50)]
        (folder / "videos" / f"{name}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
        with (folder / "videos" / "splits.csv").open("a") as file:
            file.write(("name,split\n" if split == "train" else "") + f"{name},{split}\n")
    write_demo(folder / "tutorial" / "data", train=2, val=1, test=1, seconds=5, rate=10, width=160, height=120)
    (folder / "interview.mp4").symlink_to((clips / "single_face.mp4").resolve())
    (space,) = blocks("docs/search.md", "toml")
    for name in ("clip-vit-b16", "ast"):
        space = space.replace(f'"{name}"', f'"{STAND_INS[name]}"')
    (folder / "features").mkdir()
    for number, name in enumerate(("single_face", "carphone")):  # other contents: splits may not share files
        np.save(folder / "features" / f"{name}.npy", np.random.default_rng(number).normal(size=(50, 4)))
    (folder / "plain.toml").write_text((ROOT / "vaflow" / "encoders" / "prompts.toml").read_text())
    (folder / "space.toml").write_text(space.replace("epochs = 15", "epochs = 1"))
    (folder / "sample.txt").write_bytes(tree.sample.read_bytes())
    return folder


@pytest.fixture
def here(sandbox: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The sandbox as the working directory; each page starts with the caches that the README's commands write."""
    monkeypatch.chdir(sandbox)
    callspec = getattr(request.node, "callspec", None)
    page, last = (callspec.params.get("page", "") if callspec else ""), sandbox / "last_page"
    if page != "README.md" and (not last.exists() or last.read_text() != page):
        last.write_text(page)
        for cache in (sandbox / "videos.cache", sandbox / "affwild2.cache"):
            kept = cache.with_suffix(".kept")
            if kept.exists():
                shutil.rmtree(cache)
                shutil.copytree(kept, cache)
            elif cache.exists():
                shutil.copytree(cache, kept)
    return sandbox


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(page)])
def test_command_runs(page: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line)
    assert program == "vaflow"
    assert main(with_stand_ins(arguments)) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks(page, "python")])
def test_python_block_runs(page: str, code: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, stand_in in STAND_INS.items():
        code = code.replace(f'"{name}"', f'"{stand_in}"')
    given = {"__name__": "__main__", "vaflow": vaflow}  # later blocks of a page use the import of the first
    names: dict[str, Any] = dict(given)
    exec(compile(code, page, "exec"), names)
    printed, defined = capsys.readouterr().out, names.keys() - {*given, "__builtins__"}
    if "print(" in code:
        assert re.search(r"\d\.\d", printed) and "nan" not in printed
    else:
        assert defined, "the block computes nothing"
    if "frames" in defined:  # a row per video frame
        columns = {len(names["frames"][name]) for name in ("time", "valence", "arousal")}
        assert len(columns) == 1 and columns != {0}


ALL_PAGES = [path for path in (ROOT, ROOT / "docs") for path in path.glob("*.md")]
CONSOLE = [
    (page.name, line)
    for page in ALL_PAGES
    for block in blocks(str(page), "console")
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in CONSOLE if "vaflow " in line])
def test_console_command_is_parsed(page: str, line: str) -> None:
    command, context = typer.main.get_command(app), None
    words = shlex.split(line[line.index("vaflow ") :])
    while hasattr(command, "commands"):
        context = command.make_context(words[0], words[1:], parent=context)
        words = [*context._protected_args, *context.args]
        command = command.commands[words[0]]
    assert command.make_context(words[0], words[1:], parent=context).command is command


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in CONSOLE if "pip install" in line])
def test_documented_extras_and_versions_match_the_package(page: str, line: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in shlex.split(line):
        if "[" in word:
            assert set(re.findall(r"\w+", word)) <= project["optional-dependencies"].keys()
        elif ">=" in word:
            assert word in project["dependencies"]


@pytest.mark.parametrize(
    ("page", "text"), [(page.name, text) for page in ALL_PAGES for text in blocks(str(page), "toml")]
)
def test_toml_block_is_valid(page: str, text: str) -> None:
    assert tomllib.loads(text)


def test_predict_has_written_a_table_and_a_figure(here: Path) -> None:
    assert (here / "predictions" / "interview.csv").read_text().startswith("frame,time,valence,arousal")
    assert (here / "predictions" / "interview.png").read_bytes().startswith(b"\x89PNG")


def test_ablate_has_written_a_page(here: Path) -> None:
    assert (here / "ablation" / "results.html").read_text().lower().startswith("<!doctype html>")


def test_the_submission_has_the_rows_of_the_sample(here: Path) -> None:
    rows = [(here / name).read_text().splitlines() for name in ("sample.txt", "submission.txt")]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_ci_uses_the_install_command_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    [line] = [block.strip() for block in blocks("README.md", "bash") if "'.[dev]'" in block]
    assert line in [block.strip() for block in blocks("CONTRIBUTING.md", "bash")]
    for part in line.split(" && "):
        assert part.replace("pip install", "pip install -q") in ci, part


def test_the_drawn_tree_has_every_folder_of_the_package() -> None:
    [tree] = re.findall(
        r"^```\n(vaflow/ .*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    tops, top, drawn = ("vaflow", "extract", "train"), "", set()
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, flags=re.MULTILINE):
        top = top if indent else name
        drawn |= {f"{top}/{name}" if indent else name} if top in tops else set()
    assert drawn == {str(path.parent.relative_to(ROOT)) for top in tops for path in (ROOT / top).rglob("__init__.py")}


def test_paths_in_the_guide_for_contributors_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:vaflow|extract|train|tests|scripts|docs)/[\w/.]*)`", text)
    assert len(paths) > 15 and [path for path in paths if not (ROOT / path).exists()] == []


def test_top_level_help_imports_no_heavy_library() -> None:
    program = "import sys; from vaflow.cli import main; code = main(['--help']); print(*sys.modules); sys.exit(code)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "av", "cv2", "open_clip", "transformers", "zarr", "matplotlib"}
    assert not heavy & set(run.stdout.split())


PAGES_WITH_LINKS = [path for path in (ROOT, ROOT / "docs", ROOT / "docs" / "decisions") for path in path.glob("*.md")]


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_to_existing_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name)
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, target
