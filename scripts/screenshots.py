"""Take the pictures of the pages in the documentation: docs/pictures/viewer*.webp, report*.webp and trace.png.

    python scripts/screenshots.py [--demo DIR] [--out docs/pictures] [--chromium PROGRAM]

DIR is what `vaflow demo --out DIR` writes; it is written if missing (about two minutes). The pages are opened from
disk in headless Chromium, which must be installed, as must `playwright` (extra `dev`).
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from vaflow.cli import main as vaflow

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SHOTS: dict[str, dict[str, Any]] = {
    "viewer": {"viewport": {"width": 1280, "height": 1400}, "color_scheme": "light"},
    "viewer-dark": {"viewport": {"width": 1280, "height": 1400}, "color_scheme": "dark"},
    "viewer-narrow": {"viewport": {"width": 400, "height": 1900}, "color_scheme": "light"},
    "report": {"viewport": {"width": 1100, "height": 1500}, "color_scheme": "light"},
    "report-uncertainty": {"viewport": {"width": 1100, "height": 900}, "color_scheme": "light"},
    "report-attention": {"viewport": {"width": 1100, "height": 520}, "color_scheme": "light"},
}
HEADINGS = {"report-uncertainty": "Coverage of the intervals", "report-attention": "Attention of the frames"}


def take(
    browser: Any, page_file: Path, out: Path, options: dict[str, Any], seconds: float = 0, heading: str = ""
) -> None:
    """Write one picture; of the viewer after seeking, of the report from a heading on."""
    page = browser.new_page(**options)
    page.goto(page_file.resolve().as_uri())
    page.wait_for_timeout(1500)
    if seconds:
        page.evaluate(f"document.getElementById('seek').value = {seconds}")
        page.evaluate("document.getElementById('seek').dispatchEvent(new Event('input'))")
        page.wait_for_timeout(1000)
    if heading:
        page.locator("h3", has_text=heading).first.evaluate("(node) => node.scrollIntoView()")
    image = Image.open(io.BytesIO(page.screenshot()))
    image.save(out, "WEBP", quality=82, method=6)
    page.close()
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        demo = options.demo or Path(folder) / "demo"
        if not (demo / "run" / "metrics.json").is_file():
            vaflow(["demo", "--out", str(demo)])
        run, view, report = str(demo / "run"), Path(folder) / "view", Path(folder) / "report.html"
        vaflow(["view", run, "--media", str(demo / "data"), "--boxes", "--out", str(view)])
        vaflow(["report", run, "--gates", "--viewer", str(view), "--out", str(report)])
        browser = playwright.chromium.launch(executable_path=options.chromium, args=ARGUMENTS)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, how in SHOTS.items():
            page, seconds = (report, 0.0) if name.startswith("report") else (view / "index.html", 22.4)
            take(browser, page, options.out / f"{name}.webp", how, seconds, HEADINGS.get(name, ""))
        browser.close()
        trace = Image.open(demo / "run" / "pictures" / "trace-val01.png").convert("RGB")
        trace.quantize(128).save(options.out / "trace.png", optimize=True)


if __name__ == "__main__":
    main()
