"""Pages in Chromium: accessibility, width, dark mode, no console output, hostile names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ablation_toys import made_up_schedule
from numbered_clip import write_predictions
from toy_runs import write_run
from until import until

from vaflow.cli import main
from vaflow.train.ablate.report import About, html_page
from vaflow.train.ablate.results import collect
from vaflow.train.ablate.tables import Options, Row
from vaflow.viewer.page import ViewConfig, write_viewer
from vaflow.viewer.report import write_report

OpenPage = Callable[..., Any]
HOSTILE = "<img src=x onerror=alert(1)>\"'&`${alert(2)}"


@pytest.fixture(scope="module")
def pages(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    runs = [root / "full", root / "small"]
    for seed, run in enumerate(runs):
        write_run(run, seed=seed, encoder="clip-tiny")
    write_report(runs, root / "report.html")
    viewer = write_viewer(numbered / "predictions", root / "view", config=ViewConfig([numbered / "media"]))
    for k, name in enumerate(("constant", "variable")):
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / f"{name}.mp4").symlink_to(numbered / "media" / f"{name}.mp4")
        rows = [f"{i},{i % 40 / 40},{-k * i % 30 / 30}" for i in range(100)]
        (root / "data" / f"{name}.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
    main(["check", str(root / "data"), "--html", str(root / "check.html"), "-q"])
    schedule = made_up_schedule(
        root, {"1": [Row("1", name) for name in ("full", "other")]}, {"full": 0.5, "other": 0.3}
    )
    about = About("a.cache", Options(seeds=2, aliases={"ast": "ast-tiny"}), 4, 2, 61.0)
    (root / "ablation.html").write_text(html_page(collect(schedule, root, {}), about))
    return {
        "ablation": root / "ablation.html",
        "check": root / "check.html",
        "report": root / "report.html",
        "viewer": viewer.page,
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["viewer", "report", "check", "ablation"])
def test_axe_finds_no_violation(open_page: OpenPage, pages: dict[str, Path], name: str, scheme: str) -> None:
    axe = os.environ.get("VAFLOW_TEST_AXE")
    if not axe:
        pytest.skip("VAFLOW_TEST_AXE is not set: npm pack axe-core, and point it at axe.min.js")
    page = open_page(pages[name], color_scheme=scheme)
    if name == "viewer":
        page.click("[data-rating=on]")
    page.wait_for_timeout(500)
    page.evaluate(Path(axe).read_text("utf-8"))
    rules = "" if scheme == "light" else ", runOnly: ['color-contrast']"  # nothing else depends on colours
    result = page.evaluate(f"axe.run({{ resultTypes: ['violations']{rules} }})")
    violations = [(v["id"], v["impact"], [node["html"][:120] for node in v["nodes"][:3]]) for v in result["violations"]]
    assert not violations
    assert len(result["passes"]) > (10 if scheme == "light" else 0)


@pytest.mark.parametrize("name", ["viewer", "report", "check", "ablation"])
def test_nothing_is_wider_than_400_pixels(open_page: OpenPage, pages: dict[str, Path], name: str) -> None:
    page = open_page(pages[name], viewport={"width": 400, "height": 800})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_long_names_are_divided(open_page: OpenPage, tmp_path: Path) -> None:
    write_run(tmp_path / "run", clips=["n" * 150, "b"])
    write_report([tmp_path / "run"], tmp_path / "report.html")
    for file in (tmp_path / "report.html", write_viewer(tmp_path / "run", tmp_path / "view").page):
        page = open_page(file, "#clip=" + "n" * 150, viewport={"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("name", ["viewer", "report", "check", "ablation"])
def test_dark_mode_is_dark(open_page: OpenPage, pages: dict[str, Path], name: str) -> None:
    page = open_page(pages[name], color_scheme="dark")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(json.loads(back.replace("rgb(", "[").replace(")", "]"))) < 64
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_columns_of_the_report_sort(open_page: OpenPage, pages: dict[str, Path]) -> None:
    page = open_page(pages["report"])
    table = page.locator("table.clips").first
    cells = table.locator("tbody td:nth-child(5)")

    def values() -> list[float]:
        return [float(v) for v in cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]

    head = table.locator("th", has_text="CCC mean")
    head.locator("button").click()
    assert values() == sorted(values())
    head.locator("button").click()
    assert values() == sorted(values(), reverse=True)
    assert head.get_attribute("aria-sort") == "descending"


def test_hostile_names_are_shown_as_text(open_page: OpenPage, tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    write_predictions(folder / f"{HOSTILE}.csv", [k / 10 for k in range(50)])
    item = {"csv": "", "records": {}, "media": "javascript:alert(3)//"}
    sources = {"cache": "</script><script>alert(4)</script>", "streams": {HOSTILE: {}}, "items": {HOSTILE: item}}
    (folder / "sources.json").write_text(json.dumps(sources))
    viewer = write_viewer(folder, tmp_path / "out")
    page = open_page(viewer.page)
    page.wait_for_timeout(500)
    assert page.inner_text("#title") == HOSTILE
    assert page.inner_text("#clips tbody button") == HOSTILE
    assert page.locator("img").count() == 0
    run = tmp_path / HOSTILE
    write_run(run, clips=[HOSTILE], encoder=HOSTILE)
    write_report([run], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    assert page.locator("img").count() == 0
    assert page.inner_text("table.clips tbody th") == HOSTILE


def test_a_hostile_csv_is_rejected_or_shown_as_numbers(tmp_path: Path) -> None:
    from vaflow.errors import CorruptError
    from vaflow.viewer import read_predictions

    for text in (
        "frame,time,valence,arousal\n0,0.0,<script>,1\n",
        "frame,time,valence,arousal\n0,nan,0,0\n",
        "frame,time,valence,arousal\n",
        "frame,time,valence,arousal\n0,1,0,0\n1,0,0,0\n",
        "a,b\n1,2\n",
        "",
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(CorruptError):
            read_predictions(tmp_path / "x.csv")


@pytest.mark.slow
def test_two_hundred_clips_of_25_000_frames_open_within_two_seconds(open_page: OpenPage, tmp_path: Path) -> None:
    first = tmp_path / "predictions" / "clip000.csv"
    write_predictions(first, [k / 25 for k in range(25_000)], std=True)
    for k in range(1, 200):
        (first.parent / f"clip{k:03}.csv").symlink_to(first)
    viewer = write_viewer(first.parent, tmp_path / "out")
    assert sum(clip.facts["frames"] for clip in viewer.clips) == 5_000_000
    page = open_page(viewer.page)
    until(page, "document.documentElement.dataset.ready !== undefined")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("performance.now()") < 2000
    page.keyboard.press("n")
    until(page, "document.documentElement.dataset.ready === 'clip001'")
