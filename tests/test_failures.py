"""Lists of failed items: one reader and one writer."""

import json
import os
from pathlib import Path

from vaflow.files import FAILURES, Failure, FailureLog, read_failures, write_failures

CUT = Failure("a/b", "open", "MediaError", "cut off", {"split": "val"})


def test_failure_lists_round_trip(tmp_path: Path) -> None:
    study = Failure("t1 / gated", "train", "VaflowError", "diverged", {"table": "t1", "row": "gated", "run": "12ab"})
    write_failures(tmp_path / FAILURES, [CUT, study])
    assert read_failures(tmp_path) == [CUT, study]
    line = json.loads((tmp_path / FAILURES).read_text().splitlines()[0])
    assert line == {"item": "a/b", "stage": "open", "error": "MediaError", "message": "cut off", "split": "val"}


def test_no_failure_list_is_written_without_failures(tmp_path: Path) -> None:
    log = FailureLog(tmp_path / FAILURES)
    assert list(tmp_path.iterdir()) == []
    log.add(CUT)
    assert read_failures(tmp_path) == [CUT]
    assert FailureLog(tmp_path / FAILURES).failures == []
    assert list(tmp_path.iterdir()) == []


def test_every_line_is_on_disk_when_it_is_added(tmp_path: Path) -> None:
    log = FailureLog(tmp_path / FAILURES)
    for number in range(3):
        log.add(Failure(f"clip{number}", "open", "MediaError", "cut off"), quiet=True)
        assert len((tmp_path / FAILURES).read_text().splitlines()) == number + 1


def test_shard_failure_lists_are_read_and_other_lines_skipped(tmp_path: Path, caplog) -> None:
    (tmp_path / "failures-1-of-2.jsonl").write_text('{"item": "x"}\n[1]\n{"item": 3}\nhalf a li')
    (tmp_path / "failures-2-of-2.jsonl").write_bytes(b'{"item": "y", "split": null}\n\xff')
    assert [failure.item for failure in read_failures(tmp_path)] == ["x", "y"]
    assert "not a failure" in caplog.text


def test_unrelated_files_are_not_read_as_failure_lists(tmp_path: Path) -> None:
    """A named pipe would block the reader; a symlink would escape the directory."""
    os.mkfifo(tmp_path / "failures.jsonl")
    (tmp_path / "secret").write_text('{"item": "secret"}\n')
    (tmp_path / "failures-1-of-2.jsonl").symlink_to(tmp_path / "secret")
    assert read_failures(tmp_path) == []


def test_names_that_are_not_unicode_are_listed(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    FailureLog(tmp_path / FAILURES).add(Failure(name, "open", "MediaError", "cut off"))
    assert [failure.item for failure in read_failures(tmp_path)] == [name]


def test_names_with_line_separators_are_listed(tmp_path: Path) -> None:
    failures = [Failure(f"a{mark}b", "open", "MediaError", f"a{mark}b") for mark in "\n\r\x1c\x85\u2028\u2029"]
    write_failures(tmp_path / FAILURES, failures)
    assert read_failures(tmp_path) == failures
