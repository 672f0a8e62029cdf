"""Manual ratings: drags become label CSV files with correct times."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from until import until

from vaflow.cache import open_cache
from vaflow.cache.schema import LABELS
from vaflow.cli import main
from vaflow.datasets.videos import read_csv
from vaflow.viewer.page import ViewConfig, Viewer, ViewerServer, write_viewer

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def viewer(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> Viewer:
    out = tmp_path_factory.mktemp("rated")
    return write_viewer(numbered / "predictions", out, config=ViewConfig([numbered / "media"]))


@pytest.fixture
def server(viewer: Viewer, tmp_path: Path) -> Iterator[ViewerServer]:
    with ViewerServer(viewer, tmp_path / "ratings") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


Move = tuple[float, float, float, float]


def rate(page: Any, points: list[tuple[float, float]]) -> list[Move]:
    """Drag through points of the plane while the clip plays.

    Returns:
        (seconds before, seconds after, valence, arousal) of every move.
    """
    page.click("[data-rating=on]")
    page.fill("[data-rating=name]", "Ada L.")
    page.locator("#plane").scroll_into_view_if_needed()
    box = page.locator("#plane").bounding_box()
    size, margin = box["width"] - 46, 23  # the canvas has a border of 1 pixel

    def at(v: float, a: float) -> tuple[float, float]:
        return box["x"] + margin + (v + 1) / 2 * size, box["y"] + margin + (1 - a) / 2 * size

    page.mouse.move(*at(*points[0]))
    page.mouse.down()
    until(page, "document.getElementById('media').currentTime > 0.3")
    sent = []
    now = "document.getElementById('media').currentTime"
    for v, a in points:
        before = page.evaluate(now)
        page.mouse.move(*at(v, a))
        sent.append((before, page.evaluate(now), v, a))
        page.wait_for_timeout(400)
    page.mouse.up()
    page.evaluate("document.getElementById('media').pause()")
    return sent


def check_trace(path: Path, sent: list[Move]) -> None:
    """Every value starts within 50 ms of its move; the first one starts at the button press."""
    trace = read_csv(path)
    assert trace.time is not None
    for before, after, v, a in sent[1:]:
        same = np.abs(trace.value - (v, a)).max(axis=1) < 0.02
        first = trace.time[same & (trace.time > before - 0.3)].min()
        assert before - 0.05 < first < after + 0.05


POINTS = [(-0.5, 0.5), (0.0, 0.2), (0.8, -0.9), (-1.0, 1.0), (0.25, 0.0)]


def test_a_drag_is_recorded_within_50_ms(open_page: OpenPage, viewer: Viewer, tmp_path: Path) -> None:
    page = open_page(viewer.page, "#clip=constant")
    until(page, "document.documentElement.dataset.ready === 'constant'")
    sent = rate(page, POINTS)
    with page.expect_download() as download:
        page.click("[data-rating=save]")
    assert download.value.suggested_filename == "constant.Ada_L_.csv"
    download.value.save_as(tmp_path / "constant.csv")
    assert (tmp_path / "constant.csv").read_text().splitlines()[1].endswith(",Ada L.")
    check_trace(tmp_path / "constant.csv", sent)


def test_a_second_pass_replaces_ratings_of_its_span(open_page: OpenPage, viewer: Viewer, tmp_path: Path) -> None:
    page = open_page(viewer.page, "#clip=constant")
    until(page, "document.documentElement.dataset.ready === 'constant'")
    rate(page, [(0.5, 0.5), (0.5, 0.5)])
    page.evaluate("document.getElementById('media').currentTime = 0")
    until(page, "!document.getElementById('media').seeking")
    page.click("[data-rating=on]")
    rate(page, [(-0.5, -0.5), (-0.5, -0.5), (-0.5, -0.5)])
    with page.expect_download() as download:
        page.click("[data-rating=save]")
    download.value.save_as(tmp_path / "constant.csv")
    trace = read_csv(tmp_path / "constant.csv")
    assert trace.time is not None
    assert (trace.time[1:] > trace.time[:-1]).all()
    inner = (trace.time > 0.4) & (trace.time < 1.0)
    assert (trace.value[inner] < 0).all()


def test_the_server_saves_ratings_as_labels(open_page: OpenPage, chromium: Any, server: ViewerServer) -> None:
    page = chromium.new_page(viewport={"width": 1300, "height": 1000})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.address + "#clip=variable")
    until(page, "document.documentElement.dataset.ready === 'variable'")
    sent = rate(page, POINTS)
    may_close = "window.dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert not page.evaluate(may_close), "the ratings are not saved yet"
    page.click("[data-rating=save]")
    until(page, "document.querySelector('[data-rating=count]').textContent.startsWith('Saved')")
    assert page.evaluate(may_close)
    page.close()
    assert not problems
    check_trace(server.ratings / "Ada L." / "variable.csv", sent)


def post(server: ViewerServer, document: object, **headers: str) -> int:
    fields = {"X-Vaflow-Token": server.token, "Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{server.address}ratings", json.dumps(document).encode(), fields)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


RATING = "time,valence,arousal,annotator\n0.1,0.5,-0.5,a\n0.2,0.6,-0.4,a\n"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"clip": "../../etc/passwd"}, 400),
        ({"annotator": "../up"}, 400),
        ({"annotator": "a,b"}, 400),
        ({"annotator": ""}, 400),
        ({"csv": "time,valence,arousal,annotator\n0.1,2,0,a\n"}, 400),
        ({"csv": "time,valence,arousal,annotator\n0.2,0,0,a\n0.1,0,0,a\n"}, 400),
        ({"csv": "<script>"}, 400),
    ],
)
def test_only_ratings_of_its_clips_are_saved(server: ViewerServer, change: dict[str, str], status: int) -> None:
    assert post(server, {"clip": "constant", "annotator": "ann", "csv": RATING, "page": "1", **change}) == status
    written = [path.relative_to(server.ratings).as_posix() for path in server.ratings.rglob("*.csv")]
    assert written == (["ann/constant.csv"] if status == 200 else [])


def test_ratings_that_another_page_saved_are_kept(server: ViewerServer) -> None:
    for page, value in (("1", 0.1), ("1", 0.2), ("2", 0.3), ("3", 0.4)):
        csv = f"time,valence,arousal,annotator\n0.1,{value},0,ann\n"
        assert post(server, {"clip": "constant", "annotator": "ann", "csv": csv, "page": page}) == 200
    files = {path.name: path.read_text() for path in (server.ratings / "ann").iterdir()}
    assert sorted(files) == ["constant.csv", "constant.csv.1", "constant.csv.2"]
    values = [float(files[name].splitlines()[1].split(",")[1]) for name in sorted(files)]
    assert values == [0.4, 0.2, 0.3], "a page replaces its own ratings only"


def test_requests_from_other_origins_are_rejected(server: ViewerServer) -> None:
    rating = {"clip": "constant", "annotator": "ann", "csv": RATING, "page": "1"}
    assert post(server, rating, **{"X-Vaflow-Token": "guess"}) == 403
    assert post(server, rating, Host="attacker.example") == 403
    assert post(server, rating, Origin="http://attacker.example") == 403
    assert not server.ratings.exists()
    assert server.server_address[0] == "127.0.0.1"
    for path in ("clips/../index.html", "media/999", "etc/passwd", "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.address + path)


def test_media_range_requests_are_served(server: ViewerServer) -> None:
    whole = server.viewer.clips[0].media
    assert whole is not None
    data = whole.read_bytes()
    for header, expected in (("bytes=10-19", data[10:20]), ("bytes=-5", data[-5:]), ("bytes=100-", data[100:])):
        request = urllib.request.Request(f"{server.address}media/1", headers={"Range": header})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206
            assert answer.read() == expected


def test_saved_ratings_are_labels_that_import(server: ViewerServer, tmp_path: Path) -> None:
    assert post(server, {"clip": "constant", "annotator": "ann", "csv": RATING}) == 200
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "constant.npy", np.zeros((10, 4), np.float32))
    command = ["cache", "import", str(tmp_path / "cache"), "--stream", "own", "--kind", "visual", "--rate", "10"]
    assert main([*command, "--from", str(tmp_path / "features"), "--labels", str(server.ratings / "ann"), "-q"]) == 0
    read = open_cache(tmp_path / "cache").read(LABELS, "constant")
    assert sorted(set(read.value[read.valid].tolist())) == pytest.approx([-0.5, -0.4, 0.5, 0.6])


def test_videos_without_predictions_can_be_rated(open_page: OpenPage, numbered: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("constant", "variable"):
        (media / f"{name}.mp4").symlink_to(numbered / "media" / f"{name}.mp4")
    (media / "constant.csv").write_text("time,valence,arousal\n0.1,0.5,0.5\n")  # labels, not predictions
    viewer = write_viewer(media, tmp_path / "out")
    assert [(clip.item, clip.facts["frames"]) for clip in viewer.clips] == [("constant", 300), ("variable", 251)]
    page = open_page(viewer.page, "#clip=constant")
    until(page, "document.documentElement.dataset.ready === 'constant'")
    assert "No prediction" in page.inner_text("#readout")
    sent = rate(page, POINTS)
    with page.expect_download() as download:
        page.click("[data-rating=save]")
    download.value.save_as(tmp_path / "constant.csv")
    check_trace(tmp_path / "constant.csv", sent)
