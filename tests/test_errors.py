"""Messages that `explain` builds."""

import shlex
from pathlib import Path

import pytest

from vaflow.datasets import Dataset, Note, log_left_out
from vaflow.errors import command, explain


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"problem": "It failed."}, "It failed."),
        ({"problem": "It failed", "got": "Bad magic number."}, "It failed. Got: Bad magic number."),
        ({"problem": "It failed", "expected": "a file."}, "It failed. Expected: a file."),
        ({"problem": "It failed", "got": "a, b, ..."}, "It failed. Got: a, b, ..."),
        ({"problem": "It failed", "choices": ["a", "b."]}, "It failed. Choices: a, b."),
        ({"problem": "It failed", "remedy": "vaflow check .."}, "It failed. vaflow check .."),
        ({"problem": "It failed", "remedy": "vaflow check data"}, "It failed. vaflow check data."),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_part_of_a_message_ends_in_one_full_stop(parts: dict, message: str) -> None:
    assert explain(**parts) == message


@pytest.mark.parametrize("remedy", ["", "Correct it", "Correct it."])
def test_logged_notes_end_in_one_full_stop(tmp_path, caplog: pytest.LogCaptureFixture, remedy: str) -> None:
    log_left_out(Dataset(tmp_path, "videos", (), (Note("warning", "code", "a", explain("It is wrong"), remedy),)))
    assert caplog.messages == ["a: It is wrong. Correct it." if remedy else "a: It is wrong."]


def test_commands_in_messages_can_be_pasted() -> None:
    words = ["cache", "drop", "my cache", "--absent", Path("it's here")]
    assert shlex.split(command(*words)) == ["vaflow", "cache", "drop", "my cache", "--absent", "it's here"]
    assert command("extract", "DATA", "--out", "s3://bucket/a.cache") == "vaflow extract DATA --out s3://bucket/a.cache"
