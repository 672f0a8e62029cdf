"""The wheel contains every module and data file of the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vaflow import __version__

ROOT = Path(__file__).parents[1]
SOURCES = {"vaflow": ROOT / "vaflow", "vaflow/extract": ROOT / "extract", "vaflow/train": ROOT / "train"}


def expected() -> set[str]:
    """Paths below the wheel's root of every module and TOML file."""
    files = set()
    for target, folder in SOURCES.items():
        for path in folder.rglob("*"):
            inner = path.relative_to(folder)
            if target == "vaflow" and inner.parts[0] in ("extract", "train"):
                continue  # the links
            of_pages = path.parent.name in ("static", "templates")
            if path.suffix in (".py", ".toml") or path.name in ("py.typed", "__init__.pyi") or of_pages:
                files.add(f"{target}/{inner.as_posix()}")
    return files


def test_the_wheel_has_every_module_and_data_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building without isolation needs a new setuptools")
    source = tmp_path / "source"  # build from a copy: setuptools includes leftovers of earlier builds
    for name in ("vaflow", "extract", "train"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"vaflow-{__version__}.dist-info/METADATA").decode()
        assert f"vaflow-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vaflow/")}
    assert names == expected()


def test_linked_packages_point_to_the_source_tree() -> None:
    for name in ("extract", "train"):
        link = ROOT / "vaflow" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_modules_have_at_most_450_lines() -> None:
    modules = [path for top in ("vaflow", "extract", "train") for path in (ROOT / top).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in modules}
    assert len(lines) > 100 and {path: count for path, count in lines.items() if count > 450} == {}
