"""`vaflow faces`, and what `vaflow extract` prints about people: a clip with two of them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from composites import in_a_row, write

from vaflow.cache import create_cache, open_cache
from vaflow.cache.schema import FACES, PIXELS, StreamInfo
from vaflow.cli import main
from vaflow.errors import DataError, MediaError
from vaflow.viewer.people import cached_faces, clip_card


@pytest.fixture(scope="module")
def two_people(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    folder = tmp_path_factory.mktemp("people")
    (folder / "data").mkdir()
    write(folder / "data" / "pair <b>.mp4", in_a_row(clips, "wolfgang", "obama"), 4)
    return folder


@pytest.fixture(scope="module")
def extracted(two_people: Path) -> Path:
    out = two_people / "cache"
    options = ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu"]
    assert main(["extract", str(two_people / "data"), "--out", str(out), *options]) == 0
    return out


def test_extract_prints_the_command_that_shows_all_people(
    two_people: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu", "--identity", "none"]
    assert main(["extract", str(two_people / "data"), "--out", str(tmp_path / "cache"), *options]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("1 clip shows several tracks of faces")
    assert f"vaflow faces {tmp_path / 'cache'}" in last


def test_the_page_shows_both_people_and_marks_the_stored_one(
    two_people: Path, extracted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = two_people / "page" / "faces.html"
    capsys.readouterr()
    arguments = [str(extracted), "--media", str(two_people / "data"), "--out", str(page), "--json"]
    assert main(["faces", *arguments]) == 0
    (clip,) = json.loads(capsys.readouterr().out)["clips"]
    assert [person["number"] for person in clip["people"]] == [1, 2]
    assert clip["items"] == {"1": "pair <b>"}
    assert all(person["crops"] == 8 and person["seconds"] == 4 for person in clip["people"])
    html = page.read_text("utf-8")
    assert "pair &lt;b&gt;" in html and "<b>.mp4" not in html
    assert html.count("data:image/jpeg;base64,") == 16
    assert html.count("features are of this person") == 1


def test_a_clip_with_one_sampled_face_has_a_duration(extracted: Path) -> None:
    cached = next(cached_faces(open_cache(extracted), ["pair <b>"]))
    one = {name: array[:1] for name, array in cached.faces.items() if name != "cut"} | {"cut": cached.faces["cut"]}
    card = clip_card(replace(cached, faces=one, crops=(), step=0.0))
    assert card.duration > 0 and card.people[0].seconds > 0


def test_the_page_counts_the_seconds_of_faces_that_are_seldom_found(extracted: Path) -> None:
    cached = next(cached_faces(open_cache(extracted), ["pair <b>"]))
    seldom = np.isin(cached.faces["time"], np.unique(cached.faces["time"])[::3])
    some = {name: array if name == "cut" else array[seldom] for name, array in cached.faces.items()}
    card = clip_card(replace(cached, faces=some, crops=()))
    assert [person.seconds for person in card.people] == [1.5, 1.5]  # three samples, half a second apart
    assert [len(person.spans) for person in card.people] == [3, 3]


def test_the_page_shows_no_seconds_after_the_end_of_the_clip(extracted: Path) -> None:
    cached = next(cached_faces(open_cache(extracted), ["pair <b>"]))
    assert cached.duration == pytest.approx(4)
    card = clip_card(replace(cached, duration=3.75))
    assert card.duration == 3.75
    assert all((person.seconds, person.clear) <= (3.75, 3.75) for person in card.people)
    assert all(person.spans[-1][1] == 3.75 for person in card.people)


def test_pixels_without_their_optional_frame_numbers_give_a_page_without_crops(extracted: Path, tmp_path: Path) -> None:
    faces = dict(open_cache(extracted).read(FACES, "pair <b>").arrays)
    cache = create_cache(tmp_path / "cache")
    for info in (StreamInfo(FACES, "faces", 0, "float32"), StreamInfo(PIXELS, "pixels", 0, "uint8")):
        cache.declare(info)
    cache.write(FACES, "one", faces)
    offset, time, valid = np.zeros(2, np.int64), np.zeros(1), np.zeros(1, bool)
    cache.write(PIXELS, "one", {"data": np.zeros(0, np.uint8), "offset": offset, "time": time, "valid": valid})
    (clip,) = cached_faces(cache, ["one"])
    assert not any(clip.crops) and clip.step == 0


def test_stored_crops_that_are_not_images_are_reported(extracted: Path) -> None:
    (clip,) = cached_faces(open_cache(extracted), ["pair <b>"])
    whole = bytearray(next(filter(None, clip.crops)))
    frame_header = whole.index(b"\xff\xc0")
    whole[frame_header + 5 : frame_header + 9] = b"\xff\xdc" * 2  # 65,500 x 65,500 pixels
    for jpeg in (b"text", bytes(whole)):
        with pytest.raises(MediaError, match=r"Crop 0 of pair <b> cannot be read as an image"):
            clip_card(replace(clip, crops=[jpeg] * len(clip.crops)))
    with pytest.raises(DataError, match="not those of its faces"):
        clip_card(replace(clip, crops=clip.crops[:-1]))


def test_the_face_table_lists_every_box(two_people: Path, extracted: Path) -> None:
    page = two_people / "table" / "faces.html"
    assert main(["faces", str(extracted), "--out", str(page)]) == 0
    with (page.parent / "faces.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    middles = {row["person"]: (float(row["x0"]) + float(row["x1"])) / 2 for row in rows}
    assert middles["1"] < 320 < middles["2"]


def test_the_faces_of_a_cache_on_an_object_store_are_shown(extracted: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/cache"
    assert main(["cache", "convert", str(extracted), "--out", url, "--store", "zarr"]) == 0
    assert main(["faces", url, "--out", str(tmp_path / "faces.html")]) == 0
    assert f"vaflow cache people {url}" in (tmp_path / "faces.html").read_text("utf-8")


def test_a_cache_without_a_faces_stream_is_rejected(
    two_people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    options = ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu", "--person", "largest"]
    assert main(["extract", str(two_people / "data"), "--out", str(out), *options]) == 0
    assert main(["faces", str(out), "--out", str(tmp_path / "faces.html")]) == 2
    assert "no stream of faces" in capsys.readouterr().err


def test_missing_crops_of_a_single_person_are_explained(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "one.mp4", in_a_row(clips, "obama"), 1)
    out, options = tmp_path / "cache", ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "data"), "--out", str(out), *options]) == 0
    for media, reason in ((None, "Add --media DIR"), (out, "not below"), (tmp_path / "data", "")):
        capsys.readouterr()
        arguments = ["faces", str(out), "--out", str(tmp_path / "faces.html")]
        assert main(arguments + (["--media", str(media)] if media else [])) == 0
        warning = capsys.readouterr().err
        assert ("No crops of 1 clip (one)" in warning and reason in warning) if reason else not warning


def test_an_unwritable_page_is_reported_before_any_face_is_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    for command in (["faces", str(tmp_path)], ["report", str(tmp_path)]):
        for out in (tmp_path, tmp_path / "a.mp4" / "page.html"):
            assert main([*command, "--out", str(out)]) == 2
            assert "vaflow: The page cannot be written. Expected: --out FILE." in capsys.readouterr().err


def test_another_table_beside_the_page_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faces.csv").write_text("clip,person\na,id:2\n")
    (tmp_path / "a.mp4").write_text("no video")
    assert main(["faces", str(tmp_path), "--out", str(tmp_path / "faces.html")]) == 2
    assert f"{tmp_path / 'faces.csv'}, which is written beside the page, is another table." in capsys.readouterr().err
    (tmp_path / "faces.csv").unlink()
    for _ in range(2):
        assert main(["faces", str(tmp_path), "--out", str(tmp_path / "faces.html"), "-q"]) == 1, "nothing can be read"
        assert capsys.readouterr().err.splitlines()[-1] == "Not readable: a.mp4"
