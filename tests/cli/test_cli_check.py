"""`vaflow check`: exit codes, output streams, help."""

import json
from pathlib import Path

import pytest
from affwild2_tree import Tree, build_affwild2, spoil_affwild2

from vaflow.cli import main


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return build_affwild2(tmp_path_factory.mktemp("good"), seconds=0.6)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = build_affwild2(tmp_path_factory.mktemp("broken"), seconds=0.6)
    spoil_affwild2(tree)
    return tree


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = main(["check", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_warnings_and_notes_do_not_fail(good: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, good.root)
    assert code == 0 and err == ""
    for part in (
        "layout affwild2",
        "train",
        "Labels of train",
        "valence     low  middle    high",
        "NOTE  row-count: 2",
        "0 errors",
    ):
        assert part in out


def test_errors_fail_and_state_a_remedy(broken: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, broken.root)
    assert code == 1
    assert "ERROR  unreadable: 3" in out and "  -> Extraction skips the clip" in out
    assert out.rstrip().splitlines()[-1].startswith("14 of 19 clips are usable")


def test_quiet_prints_only_problems(good: Tree, broken: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, good.root, "-q") == (0, "", "")
    code, out, _ = run(capsys, broken.root, "-q")
    assert code == 1 and "ERROR" in out and "NOTE" not in out and "WARNING" not in out


def test_verbose_lists_every_finding(good: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = run(capsys, good.root)
    _, long, _ = run(capsys, good.root, "--verbose")
    assert "(-v lists all)" in short and "(-v lists all)" not in long
    assert all(f"  {name}: Duration 0." in long for name in good.trials), "every clip is shorter than a window"


@pytest.mark.parametrize("which", ["good", "broken"])
def test_json_is_one_document(which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    tree: Tree = request.getfixturevalue(which)
    code, out, _ = run(capsys, tree.root, "--json")
    report = json.loads(out)
    assert code == (1 if report["counts"]["error"] else 0) == (which == "broken")
    assert set(tree.trials) <= set(report["items"]) and report["layout"] == "affwild2"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["nowhere"], ["does not exist"]),
        (["."], ["is empty"]),
        ([".", "--layout", "imaginary"], ["is empty"]),
    ],
)
def test_a_bad_root_is_a_usage_error(
    args: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "" and err.startswith("vaflow: ") and len(err.splitlines()) == 1
    assert all(part in err for part in parts)


def test_a_wrong_layout_is_a_usage_error(good: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, good.root, "--layout", "affwild")
    assert code == 2 and "Did you mean 'affwild2'?" in err
    code, _, err = run(capsys, good.root / "raw_videos", "--layout", "affwild2")
    assert code == 2 and "'videos' fits" in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "vaflow check ~/data/affwild2" in out and "--layout" in out


def test_findings_are_wrapped_to_the_width_of_a_terminal(
    good: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = run(capsys, good.root)
    lines = out.splitlines()[1:]  # the first one is the path
    assert [line for line in lines if len(line) > 40] == []
    assert any(line.startswith("    ") for line in lines)
