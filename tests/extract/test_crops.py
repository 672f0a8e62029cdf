"""Crop folders: file numbers are frame numbers, whatever is missing; crop identity."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaflow.errors import MediaError
from vaflow.extract.source_files import content_digest, crops_identity, file_identity, list_crops, read_crop, same_file


def draw(path: Path, value: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


def test_crop_numbers_are_frame_numbers(tmp_path: Path) -> None:
    for number in (2, 3, 7, 10000, 123456):
        draw(tmp_path / f"{number:05d}.jpg")
    assert list(list_crops([tmp_path])) == [1, 2, 6, 9999, 123455]


def test_other_files_are_ignored(tmp_path: Path) -> None:
    draw(tmp_path / "00002.jpg")
    draw(tmp_path / "4.PNG")
    draw(tmp_path / "00005.jpeg")
    for name in (
        "00001.txt",
        "Thumbs.db",
        ".DS_Store",
        "00003_mask.jpg",
        "-0006.jpg",
        "00000.jpg",
        "٣.jpg",
        "._00009.jpg",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "00008.jpg").mkdir()
    assert {number: path.name for number, path in list_crops([tmp_path]).items()} == {
        1: "00002.jpg",
        3: "4.PNG",
        4: "00005.jpeg",
    }


def test_crop_folders_are_merged_and_the_first_takes_precedence(tmp_path: Path) -> None:
    first, second, absent = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    draw(first / "00002.jpg", 10)
    draw(second / "00002.jpg", 20)
    draw(second / "00001.jpg", 30)
    merged = list_crops([first, absent, second])
    assert merged == {0: second / "00001.jpg", 1: first / "00002.jpg"}
    assert list(merged) == [0, 1]
    assert list_crops([second, first])[1] == second / "00002.jpg"


def test_reading_returns_file_bytes_and_image(tmp_path: Path) -> None:
    path = tmp_path / "00001.png"
    image = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(image).save(path)
    data, read = read_crop(path)
    assert data == path.read_bytes()
    np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_colour_mode_is_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("00001.jpg" if mode in ("L", "CMYK") else "00001.png")
    Image.new("RGB", (6, 4), (153, 153, 153)).convert(mode).save(path)
    _, image = read_crop(path)
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), 153, atol=3)


def test_unreadable_image_errors_name_the_file(tmp_path: Path) -> None:
    whole = draw(tmp_path / "whole.jpg", size=64).read_bytes()
    cases = {
        "00001.jpg": b"",
        "00002.jpg": b"no picture",
        "00003.jpg": whole[: len(whole) // 2],
        "00004.jpg": whole[:40],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name in (*cases, "00009.jpg"):
        with pytest.raises(MediaError, match=name):
            read_crop(tmp_path / name)


def test_crops_identity_changes_with_any_file(tmp_path: Path) -> None:
    for number in (1, 2, 5):
        draw(tmp_path / f"{number:05d}.jpg")
    before = crops_identity(list_crops([tmp_path]))
    assert before["count"] == 3
    assert before == crops_identity(dict(reversed(list_crops([tmp_path]).items())))
    draw(tmp_path / "00003.jpg")
    added = crops_identity(list_crops([tmp_path]))
    (tmp_path / "00003.jpg").rename(tmp_path / "00004.jpg")
    renamed = crops_identity(list_crops([tmp_path]))
    (tmp_path / "00004.jpg").write_bytes((tmp_path / "00004.jpg").read_bytes() + b"\0")
    grown = crops_identity(list_crops([tmp_path]))
    listings = [identity["listing"] for identity in (before, added, renamed, grown)]
    assert len(set(listings)) == 4


def test_a_touched_file_is_compared_by_content(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"content")
    identity = file_identity(path)
    assert identity == {
        "name": "clip.mp4",
        "size": 7,
        "mtime_ns": path.stat().st_mtime_ns,
        "blake2b": content_digest(path),
    }
    assert same_file(path, identity)
    os.utime(path, ns=(1, 1))
    assert same_file(path, identity), "touched, the same content"
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(2, 2))
    assert not same_file(path, identity), "other content of the same size"
    path.write_bytes(b"longer content")
    assert not same_file(path, identity)
    path.unlink()
    assert not same_file(path, identity)
