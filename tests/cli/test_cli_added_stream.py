"""Run the command that `vaflow ablate` prints for missing streams."""

import shlex
import shutil
from pathlib import Path

import pytest

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.train.ablate.tables import add_command

OTHER_THAN_THE_DEFAULTS = ["--dtype", "float32", "--faces", "none", "--window", "4", "--frames", "8"]
OTHER_THAN_THE_DEFAULTS += ["--precision", "bfloat16"]
DETECTED_ELSEWHERE = ["--detector", "torch", "--frames", "4"]


@pytest.mark.parametrize(
    "options", [OTHER_THAN_THE_DEFAULTS, *(pytest.param(x, marks=pytest.mark.slow) for x in ([], DETECTED_ELSEWHERE))]
)
def test_extract_add_stream_adds_only_missing_streams(options: list[str], clips: Path, tmp_path: Path) -> None:
    data, cache = tmp_path / "my data", tmp_path / "cache"
    data.mkdir()
    shutil.copy(clips / "park.mp4", data)
    assert main(["extract", str(data), "--out", str(cache), "--visual", "clip-tiny", "--audio", "none", *options]) == 0
    before = {path: path.stat().st_mtime_ns for path in (cache / "records").rglob("*.json")}
    command = add_command(open_cache(cache), [("visual", "resnet-tiny")])
    for option, value in zip(options[::2], options[1::2], strict=True):
        assert f"{option} {value}" in command
    assert main(shlex.split(command.replace("ROOT", shlex.quote(str(data))))[1:]) == 0
    assert list(open_cache(cache).items(stream="resnet-tiny")) == ["park"]
    assert {path: path.stat().st_mtime_ns for path in before} == before, "existing streams were encoded again"
