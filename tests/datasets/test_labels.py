"""Label files and the frame clock, against brute-force restatements."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vaflow.datasets import READERS, read_annotation
from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.labels import MAX_FRAME, on_clock
from vaflow.errors import DataError

FRAMES = np.array([0.0, 0.04, 0.08, 0.12, 0.2, 0.24])  # one frame of a 25-fps clip is missing


def f32(values: object) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def clip_of(folder: Path, text: str | bytes, label_format: str = "affwild2") -> Clip:
    path = folder / "trial.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Clip("trial", "train", "trial", None, None, (), path, label_format)


def read(folder: Path, text: str | bytes, label_format: str = "affwild2") -> Annotation:
    annotation = read_annotation(clip_of(folder, text, label_format))
    assert annotation is not None
    return annotation


def message(folder: Path, text: str | bytes, label_format: str = "affwild2") -> str:
    with pytest.raises(DataError) as caught:
        read(folder, text, label_format)
    return str(caught.value)


# --- the challenge's files


def test_a_clip_without_labels_has_no_annotation() -> None:
    assert read_annotation(Clip("a", None, "a", None)) is None


def test_row_k_labels_frame_k(tmp_path: Path) -> None:
    annotation = read(tmp_path, "valence,arousal\n0.1,-0.2\n0.3,-0.4\n1,-1\n")
    assert annotation.frame is not None and annotation.time is None
    assert annotation.frame.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(annotation.value, f32([[0.1, -0.2], [0.3, -0.4], [1, -1]]))


@pytest.mark.parametrize("text", ["arousal,valence\n-0.2,0.1\n", "\ufeffValence, Arousal\r\n0.1, -0.2\r\n\r\n"])
def test_the_header_orders_the_columns_and_any_line_ending_is_accepted(tmp_path: Path, text: str) -> None:
    np.testing.assert_array_equal(read(tmp_path, text).value, f32([[0.1, -0.2]]))


def test_minus_five_means_unlabelled(tmp_path: Path) -> None:
    annotation = read(tmp_path, "valence,arousal\n-5,-5\n0.5,0.5\n-5.0,-5.000\n0.25,0.25\n-5,-5\n")
    clock = on_clock(annotation, np.arange(5) / 30)
    assert clock["valid"].tolist() == [[False, False], [True, True], [False, False], [True, True], [False, False]]
    assert np.isnan(clock["value"][~clock["valid"]]).all()
    assert clock["value"][clock["valid"]].tolist() == [0.5, 0.5, 0.25, 0.25]


def test_minus_five_in_one_dimension_keeps_the_other(tmp_path: Path) -> None:
    clock = on_clock(read(tmp_path, "valence,arousal\n-5,0.5\n0.5,-5\n"), np.array([0.0, 0.04]))
    assert clock["valid"].tolist() == [[False, True], [True, False]]


def test_every_problem_is_reported_with_line_numbers(tmp_path: Path) -> None:
    text = "valence,arousal\n0.1,0.2\nhello,0.1\n0.1\n0.1,0.2,0.3\n1.5,0.1\n0.1,-2\n-4.99,0\n\n0.1,nan\n0.1,0.1\n"
    got = message(tmp_path, text)
    assert "trial.txt" in got
    for part in (
        "line 3 ('hello')",
        "not 2 columns: lines 4-5 ('0.1' first)",
        "lines 6-8 ('1.5' first)",
        "empty line between rows: line 9",
        "line 10 ('nan')",
    ):
        assert part in got, (part, got)


def test_many_problems_are_one_paragraph(tmp_path: Path) -> None:
    got = message(tmp_path, "valence,arousal\n" + "0,0\nx,0\n" * 10_000)
    assert len(got) < 2000 and "more lines" in got and "\n" not in got


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "an empty file"),
        ("\n\n", "an empty file"),
        ("valence,arousal\n", "no rows"),
        ("0.1,0.2\n0.1,0.2\n", "no header"),
        ("valence,dominance\n0.1,0.2\n", "valence,dominance"),
        (b"valence,arousal\n0.1,\xff\n", "line 2"),
        (b"\x00\x01\x02\xff" * 100, "line 1"),
    ],
)
def test_invalid_annotation_files_are_rejected(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in message(tmp_path, text)


def test_a_missing_label_file_is_an_item_error(tmp_path: Path) -> None:
    clip = Clip("a", None, "a", None, labels=tmp_path / "gone.txt", label_format="affwild2")
    with pytest.raises(DataError, match=r"gone\.txt"):
        read_annotation(clip)


@settings(max_examples=300, deadline=None)
@given(
    body=st.lists(st.lists(st.sampled_from(["0.5", "-5", "", "x", "1e9", "0", " 1 ", "nan"]), max_size=4), max_size=8),
    head=st.sampled_from(["valence,arousal", "frame,valence", "time,valence,arousal", "time,frame,arousal", "", "0,0"]),
    noise=st.text(max_size=20) | st.binary(max_size=20),
    label_format=st.sampled_from(sorted(READERS)),
)
def test_arbitrary_text_yields_an_annotation_or_a_data_error(tmp_path_factory, body, head, noise, label_format) -> None:
    tail = noise if isinstance(noise, bytes) else noise.encode("utf-8", "surrogatepass")
    text = "\n".join([head, *(",".join(row) for row in body)]).encode() + tail
    try:
        annotation = read(tmp_path_factory.mktemp("any"), text, label_format)
    except DataError:
        return
    value = annotation.value
    assert value.shape[1] == 2 and value.dtype == np.float32 and len(value)
    assert (np.isnan(value) | (np.abs(value) <= 1)).all()
    clock = on_clock(annotation, FRAMES)
    assert {len(array) for array in clock.values()} == {len(clock["time"])}
    assert len(clock["time"]) >= FRAMES.size and (np.diff(clock["time"]) > 0).all()


# --- tables beside videos


def test_tables_with_frames_may_have_gaps_and_empty_cells(tmp_path: Path) -> None:
    annotation = read(tmp_path, "frame,valence,arousal,who\n1,0.5,,me\n3,-5,0.25,me\n", "csv")
    clock = on_clock(annotation, FRAMES)
    assert np.argwhere(clock["valid"]).tolist() == [[1, 0], [3, 1]]
    assert clock["value"][1, 0] == 0.5 and clock["value"][3, 1] == 0.25


def test_a_table_may_have_one_dimension(tmp_path: Path) -> None:
    annotation = read(tmp_path, "time,arousal\n0,0.5\n0.04,-0.5\n", "csv")
    assert annotation.targets == ("arousal",) and annotation.frame is None
    assert not on_clock(annotation, FRAMES)["valid"][:, 0].any()


def test_frame_numbers_take_precedence_over_times(tmp_path: Path) -> None:
    annotation = read(tmp_path, "time,frame,valence\n7.5,2,0.5\n", "csv")
    assert annotation.time is None and annotation.frame is not None and annotation.frame.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("valence,arousal\n0,0\n", "line 1"),
        ("time,emotion\n0,0\n", "line 1"),
        ("time,time,valence\n0,0,0\n", "line 1"),
        ("frame,time,valence,arousal,face,audio,region\n0,0,0,0,1,1,v_low\n", "holds predictions"),
        ("frame|valence\n0|0\n", "frame|valence"),
        ("frame,valence\n0,0\n0,0\n", "line 3 ('0')"),
        ("frame,valence\n1.5,0\n-1,0\nx,0\n,0\n", "lines 2-5"),
        (f"frame,valence\n{MAX_FRAME + 1},0\n", "not a frame number"),
        ("frame,valence\n99999999999999999999999,0\n", "not a frame number"),
        ("time,valence\n0.2,0\n0.1,0\n", "line 3 ('0.1')"),
        ("time,valence\n-0.2,0\ninf,0\n1e999,0\n", "lines 2-4"),
    ],
)
def test_invalid_tables_are_rejected(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(tmp_path, text, "csv")


# --- the clock


def test_unlabelled_clips_have_invalid_rows_for_every_frame() -> None:
    clock = on_clock(None, FRAMES)
    np.testing.assert_array_equal(clock["time"], FRAMES)
    assert clock["value"].shape == (6, 2) and np.isnan(clock["value"]).all() and not clock["valid"].any()


@given(frames=st.integers(0, 12), rows=st.integers(1, 12), seed=st.integers(0, 9))
def test_rows_map_to_frames_and_past_the_last_frame(frames: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.choice([0.04, 0.08], frames))
    value = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    clock = on_clock(Annotation(value, frame=np.arange(rows)), times)
    assert len(clock["time"]) == max(frames, rows)
    for row in range(max(frames, rows)):
        if row < rows:
            np.testing.assert_array_equal(clock["value"][row], value[row])
        assert clock["valid"][row].tolist() == [row < rows] * 2
        if row < frames:
            assert clock["time"][row] == times[row]
    if 2 <= frames < rows:
        gaps = sorted(times[i + 1] - times[i] for i in range(frames - 1))
        middle = (gaps[(len(gaps) - 1) // 2] + gaps[len(gaps) // 2]) / 2
        np.testing.assert_allclose(clock["time"][-1], times[-1] + middle * (rows - frames))


@settings(deadline=None)
@given(
    start=st.integers(0, 30),
    gaps=st.lists(st.sampled_from([10, 10, 10, 20, 50]), max_size=10),
    frame_gap=st.sampled_from([3, 4, 7, 40]),
    frames=st.integers(1, 40),
)
def test_timestamped_rows_equal_a_loop(start: int, gaps: list[int], frame_gap: int, frames: int) -> None:
    """Whole ticks of 1/64 s, which binary numbers hold exactly, so that ties are ties."""
    rows = [start]
    for gap in gaps:
        rows.append(rows[-1] + gap)
    value = np.linspace(-1, 1, 2 * len(rows)).reshape(-1, 2).astype(np.float32)
    value[len(rows) // 2, 0] = np.nan
    times = [frame_gap * i for i in range(frames)]
    clock = on_clock(Annotation(value, time=np.array(rows) / 64), np.array(times) / 64)
    assert len(clock["time"]) == frames
    twice_median = np.median(gaps) * 2 if gaps else (frame_gap * 2 if frames > 1 else 2 * 64 / 30)
    for i, time in enumerate(times):
        best = min(range(len(rows)), key=lambda k: (abs(rows[k] - time), k))
        reach = twice_median if rows[0] <= time <= rows[-1] else twice_median / 2
        expected = value[best] if 2 * abs(rows[best] - time) <= reach else np.full(2, np.nan, np.float32)
        np.testing.assert_array_equal(clock["value"][i], expected, err_msg=f"{rows} {time}")
        assert clock["valid"][i].tolist() == np.isfinite(expected).tolist()


def test_slow_labels_are_held_for_half_an_interval() -> None:
    labels = Annotation(f32([[0.1, 0.1], [0.2, 0.2]]), time=np.array([1.0, 2.0]))
    clock = on_clock(labels, np.arange(0, 4, 0.25))
    held = {time: value for time, value in zip(clock["time"], clock["value"][:, 0], strict=True) if value == value}
    expected = {0.5: 0.1, 0.75: 0.1, 1.0: 0.1, 1.25: 0.1, 1.5: 0.1, 1.75: 0.2, 2.0: 0.2, 2.25: 0.2, 2.5: 0.2}
    assert held == pytest.approx(expected)


def test_timestamped_rows_without_frames_keep_their_times() -> None:
    labels = Annotation(f32([[0.1, 0.1], [0.2, 0.2]]), time=np.array([1.0, 2.0]))
    clock = on_clock(labels, np.empty(0))
    assert clock["time"].tolist() == [1.0, 2.0] and clock["valid"].all()


@pytest.mark.parametrize(
    "text",
    [
        "time;valence;arousal\n0,5;0,25;-0,5\n1,0;-5;1\n",
        "\ufefftime;valence;arousal\r\n0.5;0.25;-.5\r\n1;-5;1,0\r\n",
        "time\tvalence\tarousal\n0,5\t0,25\t-0,5\n1\t-5\t1\n",
        '"time","valence","arousal"\n"0.5","0.25","-0.5"\n"1","-5","1"\n',
    ],
)
def test_spreadsheet_exports_are_read(tmp_path: Path, text: str) -> None:
    annotation = read(tmp_path, text, "csv")
    assert annotation.time is not None and annotation.time.tolist() == [0.5, 1.0]
    np.testing.assert_array_equal(annotation.value, f32([[0.25, -0.5], [np.nan, 1]]))


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "NA"])
def test_cells_that_pandas_writes_for_missing_values_are_unlabelled(tmp_path: Path, cell: str) -> None:
    text = f"time,valence,arousal\n0,{cell},0.5\n1,0.25,{cell}\n"
    np.testing.assert_array_equal(read(tmp_path, text, "csv").value, f32([[np.nan, 0.5], [0.25, np.nan]]))
    assert "line 2 ('inf')" in message(tmp_path, text.replace("0.5", "inf"), "csv")
