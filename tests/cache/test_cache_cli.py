"""`vaflow cache info|verify|repair`: exit codes, JSON on standard output, messages elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cache_toys import small_cache

from vaflow.cache import open_cache
from vaflow.cli import main


def damage(path: Path) -> str:
    """Damage one file of item "c"; return its path in the cache."""
    name = sorted(open_cache(path).record("visual", "c").files)[0]
    file = path / "visual" / "c" / name
    file.write_bytes(file.read_bytes()[:-1])
    return file.relative_to(path).as_posix()


def test_info_prints_a_table(tmp_path, store, capsys):
    cache = small_cache(tmp_path / "cache", store)
    assert main(["cache", "info", str(cache.path)]) == 0
    printed = capsys.readouterr().out
    assert f"{store}, schema version 1" in printed
    assert "2 clips (train 1, val 1)" in printed
    row = next(line for line in printed.splitlines() if line.startswith("visual "))
    assert re.split(r"\s{2,}", row)[:5] == ["visual", "visual", "6", "float16", "2"]
    assert cache.fingerprint("visual")[:8] in row
    assert row.endswith("toy-visual")


def test_info_json_is_one_document(tmp_path, store, capsys):
    cache = small_cache(tmp_path / "cache", store)
    assert main(["cache", "info", str(cache.path), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(cache.info()))
    assert printed.err == ""


def test_info_accepts_an_empty_cache(tmp_path, capsys):
    from vaflow.cache import create_cache

    create_cache(tmp_path / "cache")
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert "no streams yet" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0


def test_verify_uses_the_singular_for_one_item(tmp_path, store, capsys):
    cache = small_cache(tmp_path / "cache", store)
    committed = [(stream, item) for stream in cache.streams() for item in cache.source_stamps(stream)]
    for name, clip in committed[1:]:
        cache.drop(name, clip)
    assert main(["cache", "verify", str(cache.path)]) == 0
    assert "1 item matches its checksums" in capsys.readouterr().out


def test_verify_and_repair(tmp_path, store, capsys):
    path = small_cache(tmp_path / "cache", store).path
    assert main(["cache", "verify", str(path)]) == 0
    assert "4 items match their checksums" in capsys.readouterr().out
    file = damage(path)
    assert main(["cache", "verify", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"{file} (item 'c' of stream 'visual'): it has" in printed.out
    assert f"1 problem. Repair with: vaflow cache repair {path}" in printed.err
    assert main(["cache", "verify", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(p["path"], p["stream"], p["item"]) for p in report["problems"]] == [(file, "visual", "c")]
    assert report["items"] == 4
    assert main(["cache", "repair", str(path)]) == 0
    assert "1 problem repaired" in capsys.readouterr().out
    assert main(["cache", "verify", str(path), "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert not open_cache(path).has("visual", "c")


def test_repair_does_not_claim_to_repair_a_lost_stream_file(tmp_path, store, capsys):
    path = small_cache(tmp_path / "cache", store).path
    (path / "streams" / "visual.json").unlink()
    assert main(["cache", "repair", str(path)]) == 0
    printed = capsys.readouterr()
    assert "0 problems repaired" in printed.out
    assert "1 stream file lost: extract or import again with the same settings" in printed.err


def test_repair_prints_json(tmp_path, store, capsys):
    path = small_cache(tmp_path / "cache", store).path
    file = damage(path)
    assert main(["cache", "repair", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [problem["path"] for problem in report["problems"]] == [file]
    assert (report["items"], report["removed_leftovers"]) == (3, [])


def test_verify_accepts_leftovers_of_killed_writers(tmp_path, store, capsys):
    path = small_cache(tmp_path / "cache", store).path
    (path / "visual" / "c" / "0123456789abcdef").mkdir()
    assert main(["cache", "verify", str(path), "-v"]) == 0
    printed = capsys.readouterr()
    assert "visual/c/0123456789abcdef" in printed.err
    assert "match their checksums" in printed.out


@pytest.mark.parametrize("command", ["info", "verify", "repair"])
def test_a_directory_without_a_cache_is_a_usage_error(tmp_path, command, capsys):
    assert main(["cache", command, str(tmp_path / "nowhere")]) == 2
    assert "is not a cache" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verify_reports_and_repair_restores_a_damaged_manifest(tmp_path, store, capsys):
    path = small_cache(tmp_path / "cache", store).path
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert main(["cache", "verify", str(path)]) == 1
    assert f"vaflow cache repair {path}" in capsys.readouterr().err
    assert main(["cache", "repair", str(path)]) == 0
    assert main(["cache", "verify", str(path)]) == 0


@pytest.mark.parametrize("command", ["info", "verify", "repair"])
def test_the_example_in_the_help_runs(tmp_path, store, command, capsys, monkeypatch):
    small_cache(tmp_path / "cache", store)
    assert main(["cache", command, "--help"]) == 0
    example = re.search(r"Example: vaflow ([^\n]+)", capsys.readouterr().out)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    assert main(example[1].split()) == 0


def test_cache_commands_import_no_heavy_library(tmp_path):
    path = small_cache(tmp_path / "cache", "hdf5").path
    code = (
        "import sys\n"
        "from vaflow.cli import main\n"
        f"assert main(['cache', 'info', {str(path)!r}]) == 0\n"
        "print(sorted({'torch', 'zarr', 'h5py', 'transformers', 'av'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[-1] == "[]"
