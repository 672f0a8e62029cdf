"""People in composites of real clips, counted against the known composition."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from composites import (
    Drawn,
    count,
    in_a_row,
    inset,
    mirrored,
    one_after_another,
    people_of,
    wipe,
    write,
)

from vaflow.extract.faces.identity import resolve

Composite = tuple[Callable[[float], Drawn], float]


def composites(clips: Path) -> dict[str, Composite]:
    """Name -> how it is drawn, and its seconds."""
    interview = one_after_another(clips, ("wolfgang", 3), ("obama", 2), ("wolfgang", 3))
    return {
        "two side by side": (in_a_row(clips, "wolfgang", "obama"), 6),
        "three side by side": (in_a_row(clips, "wolfgang", "carphone", "single"), 6),
        "cut to another and back": (interview, 8),
        "one leaves and returns": (one_after_another(clips, ("wolfgang", 3), ("nobody", 3), ("wolfgang", 3)), 9),
        "picture in picture": (inset(clips, "wolfgang", "carphone"), 6),
        "split-screen transition": (wipe(clips, "wolfgang", "obama", 3, 5), 8),
        "10 s of no face": (one_after_another(clips, ("single", 2), ("nobody", 10), ("single", 2)), 14),
        "mirrored": (mirrored(interview), 8),
    }


@pytest.fixture
def network() -> str:
    name = resolve("auto")
    if name == "none":
        pytest.skip("no face-recognition network is installed: pip install -e '.[identity]'")
    return name


@pytest.mark.parametrize(
    "name",
    [
        "three side by side",
        "cut to another and back",
        "split-screen transition",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "two side by side",
                "picture in picture",
                "one leaves and returns",
                "10 s of no face",
                "mirrored",
            )
        ),
    ],
)
def test_every_second_follows_the_right_person(name: str, clips: Path, tmp_path: Path, network: str) -> None:
    draw, seconds = composites(clips)[name]
    counts = count(people_of(write(tmp_path / "clip.mp4", draw, seconds), network), draw, seconds)
    assert counts.switches == 0
    assert counts.people == counts.expected
    assert counts.right == counts.total
    assert counts.missed == 0


@pytest.mark.slow  # test_alignment turns frames
def test_rotation_metadata_does_not_change_the_person(clips: Path, tmp_path: Path, network: str) -> None:
    draw, seconds = composites(clips)["two side by side"]
    path = write(tmp_path / "turned.mp4", draw, seconds, turned=True)
    counts = count(people_of(path, network), draw, seconds)
    assert (counts.people, counts.switches, counts.missed) == (2, 0, 0)
    assert counts.right == counts.total


def test_tracks_are_not_joined_across_a_cut_without_embeddings(clips: Path, tmp_path: Path) -> None:
    draw, seconds = composites(clips)["cut to another and back"]
    people = people_of(write(tmp_path / "clip.mp4", draw, seconds), "none")
    counts = count(people, draw, seconds)
    assert counts.people == 3, "one for each shot"
    assert counts.switches == 0
    np.testing.assert_allclose(people.cuts, [3.0, 5.0], atol=0.5)
