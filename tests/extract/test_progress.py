"""The progress bar counts seconds of video, within clips as well."""

from pathlib import Path

import pytest

from vaflow.extract.plan import Extracted, OutcomeRecorder, Summary
from vaflow.files import FailureLog


def test_progress_advances_within_a_long_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FailureLog(tmp_path / "failures.jsonl")
    with OutcomeRecorder(Summary(), log, {"long": 90.0, "short": 10.0}, show_progress=True) as recorder:
        assert "0/100 s of video" in capsys.readouterr().err, "shown at once"
        recorder.progress("long", 0.5)
        recorder.progress("long", 0.25)  # messages of another thread may be late: the bar does not go back
        recorder.take(Extracted("short", 10.0))
        recorder.count({"clip-tiny": 5}, {}, {})
    shown = capsys.readouterr().err
    assert "55/100 s of video" in shown
    assert "1/2 clips" in shown


def test_progress_never_exceeds_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FailureLog(tmp_path / "failures.jsonl")
    with OutcomeRecorder(Summary(), log, {"one": 6.3, "short": 0.5}, show_progress=True) as recorder:
        recorder.take(Extracted("one", 6.3))
        recorder.take(Extracted("short", 0.5))
        recorder.progress("unplanned", 1.0)
    shown = capsys.readouterr().err
    assert "TqdmWarning" not in shown and "7/7 s of video" in shown
