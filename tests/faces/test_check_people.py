"""`vaflow check`: several people and cuts, from a few frames of each clip or from a cache."""

import json
from pathlib import Path

import numpy as np
import pytest
from composites import in_a_row, one_after_another, write

from vaflow.cache import create_cache
from vaflow.cache.schema import FACES, LABELS, StreamInfo
from vaflow.cli import main
from vaflow.datasets.clip import Clip
from vaflow.extract.doctor.facts import PeopleFacts, look_at_people
from vaflow.extract.doctor.findings import people_findings
from vaflow.extract.faces.crops import TEMPLATE, quarter_turn
from vaflow.extract.faces.people import no_faces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    folder = tmp_path_factory.mktemp("check") / "data"
    folder.mkdir()
    write(folder / "pair.mp4", in_a_row(clips, "wolfgang", "obama"), 2)
    write(folder / "cuts.mp4", one_after_another(clips, ("wolfgang", 2), ("obama", 2), ("wolfgang", 2)), 6)
    return folder


def test_people_and_cuts_are_notes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(data), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {name: item["people"] for name, item in document["items"].items()} == {
        "pair": {"people": 2, "cuts": 0, "frames": document["items"]["pair"]["people"]["frames"], "turned": 0},
        "cuts": {"people": 1, "cuts": 2, "frames": document["items"]["cuts"]["people"]["frames"], "turned": 0},
    }
    notes = {(note["code"], note["item"]) for note in document["findings"]}
    assert {("several-people", "pair"), ("cuts", "cuts")} <= notes
    assert not {("cuts", "pair"), ("several-people", "cuts")} & notes


def test_no_people_disables_face_detection(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(data), "--json", "--no-people"]) == 0
    assert all(item["people"] is None for item in json.loads(capsys.readouterr().out)["items"].values())


def test_check_reads_the_number_of_people_from_a_cache(tmp_path: Path) -> None:
    """The video is not opened, and does not exist."""
    cache = create_cache(tmp_path / "cache")
    cache.declare(StreamInfo(FACES, "faces", 0, "float32", {"encoder": FACES}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    cache.write(FACES, "a#1", dict(no_faces()), meta={"people": 5, "notable": 3, "cuts": 7})
    clip = Clip("a", None, "a", tmp_path / "a.mp4", tmp_path / "a.mp4")
    assert look_at_people([(clip, 60.0)], cache) == {"a": PeopleFacts(3, 7, 0)}


def test_check_reports_the_number_of_examined_clips(tmp_path: Path) -> None:
    notes = people_findings({"a": PeopleFacts(1, 0, 20)}, [Clip(name, None, name, None) for name in "abcd"], tmp_path)
    assert [(note.code, note.message) for note in notes] == [
        ("people-sampled", "People and cuts were looked for in 1 of 4 clips")
    ]


def test_the_person_of_a_trial_is_the_one_on_its_side(tmp_path: Path) -> None:
    clips = [Clip("a_left", None, "a", None, side="left"), Clip("b", None, "b", None)]
    one, other = people_findings({clip.id: PeopleFacts(2, 0, 20) for clip in clips}, clips, tmp_path)
    assert one.message == "2 people in one frame; the one on the left is estimated" and "--person" not in one.remedy
    assert other.message == "2 people in one frame; the main one is estimated" and "--person" in other.remedy


def test_faces_upside_down_are_reported(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(time: float) -> tuple[np.ndarray, list[tuple[str, tuple[float, float, float, float]]]]:
        image, where = in_a_row(clips, "wolfgang")(time)
        return np.ascontiguousarray(image[::-1, ::-1]), where

    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.mp4", draw, 2)
    assert main(["check", str(tmp_path / "data"), "--json"]) == 0
    (note,) = (n for n in json.loads(capsys.readouterr().out)["findings"] if n["code"] == "turned-faces")
    assert "turned by 180 degrees" in note["message"]
    assert note["remedy"] == "Turn the video: ffmpeg -i OLD -vf hflip,vflip NEW"
    options = ["--visual", "clip-tiny", "--audio", "none", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), *options]) == 0
    assert "a: most faces are turned by 180 degrees" in capsys.readouterr().err


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_most_faces_decide_the_turn(degrees: int) -> None:
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # clockwise, with y downward
    turned, upright = TEMPLATE @ turn.T, TEMPLATE
    assert quarter_turn(np.stack([turned, turned, upright])) == degrees
    assert quarter_turn(np.stack([turned, upright])) == 0
    assert quarter_turn(np.zeros((0, 5, 2))) == 0
