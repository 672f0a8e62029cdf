"""The documentation site builds without warnings, and the notebook runs on a cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `--strict` turns broken links and missing pages into errors."""
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_the_help_of_every_command(site: Path) -> None:
    page = (site / "commands" / "index.html").read_text()
    for command in ("vaflow extract", "vaflow train", "vaflow cache import", "vaflow info"):
        assert f"Usage: {command}" in page


def test_the_site_has_the_signatures_of_the_functions(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for name in ("load", "extract", "train", "open_cache", "Run.predict", "Table.to_pandas"):
        assert f'id="vaflow.api.{name}"' in page


def test_the_site_has_the_cache_format(site: Path) -> None:
    assert "manifest.json" in (site / "cache-format" / "index.html").read_text()


def test_every_image_has_a_description(site: Path) -> None:
    images = [tag for page in site.rglob("*.html") for tag in re.findall(r"<img [^>]*>", page.read_text())]
    assert [tag for tag in images if not re.search(r'alt="[^"]+"', tag) and "twemoji" not in tag] == []


def test_the_notebook_runs(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    import vaflow

    torch.set_num_threads(1)
    videos = tmp_path / "videos"
    videos.mkdir()
    for split, name in (("train", "single_face"), ("val", "carphone")):
        (videos / f"{name}.mp4").symlink_to((clips / f"{name}.mp4").resolve())
        rows = [f"{k / 25},{k % 40 / 80},{k % 25 / 50 - 0.3}" for k in range(50)]
        (videos / f"{name}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
        with (videos / "splits.csv").open("a") as file:
            file.write(("name,split\n" if split == "train" else "") + f"{name},{split}\n")
    demo = tmp_path / "demo"
    vaflow.extract(videos, demo / "cache", visual=["clip-tiny"], audio=["ast-tiny"])
    vaflow.train(demo / "cache", demo / "run", epochs=1, hidden=16, device="cpu")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    monkeypatch.setenv("MPLBACKEND", "agg")
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    assert "clip-tiny visual" in str(notebook.cells[3].outputs)
    assert "valence" in str(notebook.cells[-1].outputs)
