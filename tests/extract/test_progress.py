"""The progress bar counts seconds of video, within clips as well."""

from pathlib import Path

import pytest

from vaflow.extract.summary import Books, Extracted, Summary
from vaflow.failures import FailureLog


def test_progress_advances_within_a_long_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FailureLog(tmp_path / "failures.jsonl")
    with Books(Summary(), log, {"long": 90.0, "short": 10.0}, show_progress=True) as books:
        assert "0/100 s of video" in capsys.readouterr().err, "shown at once"
        books.progress("long", 0.5)
        books.progress("long", 0.25)  # messages of another thread may be late: the bar does not go back
        books.take(Extracted("short", 10.0))
        books.count({"clip-tiny": 5}, {}, {})
    shown = capsys.readouterr().err
    assert "55/100 s of video" in shown
    assert "1/2 clips" in shown


def test_progress_never_exceeds_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FailureLog(tmp_path / "failures.jsonl")
    with Books(Summary(), log, {"one": 6.3, "short": 0.5}, show_progress=True) as books:
        books.take(Extracted("one", 6.3))
        books.take(Extracted("short", 0.5))
        books.progress("unplanned", 1.0)
    shown = capsys.readouterr().err
    assert "TqdmWarning" not in shown and "8/8 s of video" in shown
