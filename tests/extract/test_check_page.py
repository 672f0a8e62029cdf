"""The page of `vaflow check --html`: one valid, self-contained, escaped and correct file."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import Tree, build_affwild2, spoil_affwild2, write_crops, write_labels, write_video
from PIL import Image

from vaflow.cli import main
from vaflow.datasets import Clip, open_dataset
from vaflow.extract.doctor import Checked, Report, check_dataset
from vaflow.extract.doctor.facts import BINS
from vaflow.extract.doctor.page import (
    CLIPS_WITH_IMAGES,
    THUMBNAIL,
    clips_with_images,
    coverage_bars,
    html_page,
    thumbnails,
)

VOID = {"meta", "img", "br"}
HOSTILE = '<script>alert(1)</script>"onload="x&amp;'


class Page(HTMLParser):
    """Check nesting; collect tags, text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open}"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = build_affwild2(tmp_path_factory.mktemp("page"), seconds=0.8)
    spoil_affwild2(tree)
    return tree


@pytest.fixture(scope="module")
def report(tree: Tree) -> Report:
    return check_dataset(open_dataset(tree.root))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    chosen = clips_with_images(report)
    images = {c.clip.id: thumbnails(c.clip, c.media.duration if c.media else None) for c in chosen}
    return html_page(report, images)


def test_the_page_is_valid_html_without_external_resources(page: str) -> None:
    parsed = Page(page)
    assert parsed.sources and all(source.startswith("data:image/jpeg;base64,") for source in parsed.sources)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    assert not any(name.startswith("on") for name in parsed.attributes)
    assert "default-src 'none'" in page, "the page must set a content security policy"


def test_the_page_lists_every_finding_clip_and_cost(page: str, report: Report) -> None:
    text = Page(page).text
    for note in report.findings:
        assert note.code in text and note.message in text
    assert all(checked.clip.id in text for checked in report.checked)
    for kind in report.kinds():
        assert kind.cost in text and all(remedy in text for remedy in kind.remedies)


def test_images_are_small_jpegs(page: str) -> None:
    for source in Page(page).sources:
        with Image.open(BytesIO(b64decode(source.partition(",")[2], validate=True))) as image:
            assert image.format == "JPEG" and max(image.size) <= THUMBNAIL


def test_large_frames_become_small_images(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300)).save(tmp_path / "00000.png")
    (small,) = thumbnails(Clip("clip", None, "clip", None, frames=tmp_path, frame_rate=25.0), None)
    with Image.open(BytesIO(small.jpeg)) as image:
        assert image.size == (THUMBNAIL, 84)


def test_every_kind_of_finding_has_a_clip_with_images(report: Report) -> None:
    names = {checked.clip.id for checked in clips_with_images(report)}
    ids = {checked.clip.id for checked in report.checked}
    assert len(names) <= CLIPS_WITH_IMAGES
    for kind in report.kinds():
        items = set(kind.items) & ids
        assert not items or items & names, kind.code
    assert len(clips_with_images(report, 2)) == 2 and clips_with_images(report, 2)[0].clip.id == "badlabels"


def test_a_leak_is_shown_on_the_cards_of_its_clips(page: str) -> None:
    card = re.search(r"<h3>video5_left .*?</article>", page, re.DOTALL)
    assert card is not None and ">leak<" in card.group()


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_")
    write_video(tmp_path / "raw_videos" / f"{name}.mp4", np.arange(20) / 25, 0.8)
    write_crops(tmp_path / "cropped_aligned" / name, (1, 5))
    write_labels(tmp_path / "VA_Set" / "Train_Set" / f"{name}.txt", np.full((20, 2), 0.5))
    code = main(["check", str(tmp_path), "--html", str(tmp_path / "check.html"), "-q"])
    page = (tmp_path / "check.html").read_text()
    parsed = Page(page)
    assert code == 0 and "script" not in parsed.tags and "onload" not in parsed.attributes
    assert name in parsed.text


def test_an_empty_report_has_a_page(report: Report) -> None:
    page = Page(html_page(Report(report.root, "videos", (), ()), {}))
    assert f"Check of {report.root.name}" in page.text


# --- parts


def drawn(checked: Checked) -> dict[str, np.ndarray]:
    """Bins covered by each path class and track, read from the SVG."""
    strips = {name: np.zeros((3, BINS), bool) for name in ("there", "part", "missing", "nothing")}
    for name, path in re.findall(r'<path class="(\w+)" d="([^"]+)"', coverage_bars(checked)):
        for x, y, width in re.findall(r"M(\d+) ([\d.]+)h(\d+)", path):
            strips[name][int(float(y) // 11), int(x) : int(x) + int(width)] = True
    return strips


def test_strips_show_labels_crops_and_audio_at_their_times(report: Report, tree: Tree) -> None:
    by_id = {checked.clip.id: checked for checked in report.checked}
    checked, trial = by_id["video5_left"], tree.trials["video5_left"]
    assert trial.labels is not None
    shown = drawn(checked)
    for k in range(BINS):
        frame = int((k + 0.5) / BINS * trial.times.size)
        has_label = shown["there"][0, k] or shown["part"][0, k]
        if int((k + 1.5) / BINS * trial.times.size) == frame == int((k - 0.5) / BINS * trial.times.size):
            assert has_label == (trial.labels[frame, 0] != -5), k
    assert shown["there"][1].all() and shown["there"][2, : BINS * 9 // 10].all()
    silent = drawn(by_id["video9"])
    assert silent["missing"][2].all() and silent["missing"][1].mean() > 0.9
    assert drawn(by_id["video20"])["nothing"][0].all(), "a test trial has no labels"
    shown = drawn(by_id["8-30-64x64"])
    assert shown["missing"][2].mean() == pytest.approx(0.5, abs=0.1)
    for name in ("there", "part", "missing", "nothing"):
        for other in ("there", "part", "missing", "nothing"):
            assert name == other or not (shown[name] & shown[other]).any()


def test_clips_without_crops_show_video_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, np.arange(20) / 25, 0.8)
    clip = Clip("clip", None, "clip", path, path)
    assert thumbnails(clip, 0.8)[0].caption == "frame at 0.0 s"
    assert thumbnails(clip, None) == ()
    path.write_text("no video")
    assert thumbnails(clip, 0.8) == ()


def test_an_unwritable_page_is_reported_before_any_clip_is_read(tree: Tree, tmp_path: Path, capsys) -> None:
    for target in (tmp_path / "nowhere" / "x.html", tmp_path):
        assert main(["check", str(tree.root), "--html", str(target)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "The page cannot be written" in err


def test_json_is_one_document_when_a_page_is_written(tree: Tree, tmp_path: Path, capsys) -> None:
    import json

    assert main(["check", str(tree.root), "--json", "--html", str(tmp_path / "x.html")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["layout"] == "affwild2" and "x.html" in err
    Page((tmp_path / "x.html").read_text())


def test_terminal_control_characters_are_escaped(tmp_path: Path) -> None:
    name = "red\x1b[31m\u202etext"
    (tmp_path / f"{name}.mp4").write_bytes(b"no video")
    page = html_page(check_dataset(open_dataset(tmp_path)), {})
    assert not set("\x1b\u202e") & set(page) and "red\\x1b[31m\\u202etext" in page
