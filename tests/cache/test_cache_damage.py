"""`verify` and reading detect every flipped bit, truncation and missing file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import create_cache, open_cache
from vaflow.cache.maintenance import leftovers, open_for_repair, repair, verify
from vaflow.errors import CorruptError, FingerprintError, MissingError, SchemaError, UsageError, VaflowError

POSITIONS = 40  # number of damaged bytes over all files; all eight bits of each


@pytest.fixture
def path(tmp_path: Path, store: str) -> Path:
    """A cache that includes all-zero and empty arrays, which stores tend to omit."""
    cache = small_cache(tmp_path / "cache", store, ("é",))
    cache.write("visual", "zeros", arrays(stream("visual"), zeros=True))
    cache.write("labels", "empty", arrays(stream("labels"), 0), meta={"split": "train"})
    return cache.path


def committed_files(path: Path) -> list[Path]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "index.json")
    assert len(files) >= 1 + 2 + 4 + 4
    return files


def owner(path: Path, file: Path) -> tuple[str, str] | None:
    """(stream, item) whose record or arrays the file is."""
    for record in path.glob("records/*/*.json"):
        stream_name = record.parent.name
        if file == record or file.is_relative_to(path / stream_name / record.stem):
            return stream_name, {"%C3%A9": "é"}.get(record.stem, record.stem)
    return None


def read_all(path: Path) -> None:
    """Read the whole cache; raise on any damage."""
    cache = open_cache(path)
    for stream_name in ("visual", "labels"):
        for item in ("é", "zeros" if stream_name == "visual" else "empty"):
            cache.read(stream_name, item)


def assert_detected(path: Path, file: Path, words: str) -> None:
    """`verify` and reading both say that `file` is damaged."""
    with pytest.raises((CorruptError, SchemaError, MissingError, UsageError)):
        read_all(path)
    try:
        cache = open_cache(path)
    except VaflowError as error:
        assert file.name == "manifest.json", words
        assert str(path) in str(error)
        return
    problems = verify(cache)
    assert problems, f"verify misses {words}"
    assert any(problem.path == file.relative_to(path).as_posix() for problem in problems), words


def flips(data: bytes, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """`data` with one bit flipped: every bit of `count` bytes."""
    rng = np.random.default_rng(seed)
    for position in rng.choice(len(data), min(count, len(data)), replace=False).tolist():
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            yield position, bytes(flipped)


@pytest.mark.slow  # bits of a smaller cache: faults/test_faults_flips.py
def test_every_flipped_bit_is_detected(path):
    files = committed_files(path)
    for number, file in enumerate(files):
        data = file.read_bytes()
        for position, flipped in flips(data, POSITIONS // len(files), number):
            file.write_bytes(flipped)
            assert_detected(path, file, f"a flipped bit in byte {position} of {file.relative_to(path)}")
        file.write_bytes(data)
    assert verify(open_cache(path)) == []


def test_every_truncation_is_detected(path):
    for file in committed_files(path):
        data = file.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 1} - {len(data)}:
            file.write_bytes(data[:length])
            assert_detected(path, file, f"{file.relative_to(path)} cut to {length} bytes")
        file.write_bytes(data + b"\0")
        assert_detected(path, file, f"{file.relative_to(path)} with a byte more")
        file.write_bytes(data)


def test_every_deletion_is_detected(path):
    for file in committed_files(path):
        data = file.read_bytes()
        file.unlink()
        if file.is_relative_to(path / "records"):  # an item without a record does not exist
            with pytest.raises(MissingError):
                read_all(path)
            assert len(leftovers(open_cache(path))) == 1
        else:
            assert_detected(path, file, f"{file.relative_to(path)} deleted")
        file.write_bytes(data)


def test_damage_is_reported_with_a_remedy(path):
    record = open_cache(path).record("visual", "é")
    name = next(iter(record.files))
    (path / "visual" / "%C3%A9" / name).write_bytes(b"")
    with pytest.raises(CorruptError) as caught:
        open_cache(path).read("visual", "é")
    for part in (f"visual/%C3%A9/{name}", "'é'", "'visual'", "0 bytes", f"vaflow cache repair {path}"):
        assert part in str(caught.value)


def test_a_damaged_record_is_always_reported(path):
    """A clip that disappears silently would change results."""
    record = path / "records" / "labels" / "empty.json"
    record.write_bytes(record.read_bytes().replace(b'"train"', b'"trail"'))
    for use in (
        lambda cache: cache.items(),
        lambda cache: cache.items("val"),
        lambda cache: cache.meta("empty"),
    ):
        with pytest.raises(CorruptError, match=r"records/labels/empty\.json.*checksum"):
            use(open_cache(path))
    assert open_cache(path).info()["streams"]["labels"]["damaged"] == 1


def test_a_swapped_record_is_detected(path):
    folder = path / "records" / "labels"
    (folder / "copy.json").write_bytes((folder / "empty.json").read_bytes())
    problems = verify(open_cache(path))
    assert [problem.path for problem in problems] == ["records/labels/copy.json"]
    assert "'empty'" in problems[0].message


def test_repair_drops_only_damaged_items(path):
    cache = open_cache(path, writable=True)
    kept = dict(cache.read("visual", "é").arrays)
    file = next(iter(cache.record("visual", "zeros").files))
    (path / "visual" / "zeros" / file).unlink()
    (path / "records" / "labels" / "%C3%A9.json").write_bytes(b"{}")
    problems = repair(cache)
    assert sorted(problem.path for problem in problems) == ["records/labels/%C3%A9.json", f"visual/zeros/{file}"]
    for opened in (cache, open_cache(path)):
        assert verify(opened) == []
        assert opened.items() == ["empty"]
        assert not opened.has("visual", "zeros")
        assert not opened.has("labels", "é")
        assert_same(dict(opened.read("visual", "é").arrays), kept)
    cache.write("visual", "zeros", arrays(stream("visual"), zeros=True))
    assert verify(cache) == []


def test_repair_keeps_items_whose_stream_file_was_lost(path):
    """A lost stream file is rewritten by the next extraction; the encoded items are kept."""
    (path / "streams" / "visual.json").write_bytes(b"not JSON")
    with pytest.raises(CorruptError, match=r"streams/visual\.json"):
        open_cache(path).streams()
    cache = open_cache(path, writable=True)
    assert [problem.path for problem in repair(cache)] == ["streams/visual.json"]
    assert [problem.path for problem in verify(cache)] == ["streams/visual.json"]
    with pytest.raises(FingerprintError, match="is missing"):
        cache.declare(stream("visual", "float32"))
    cache.declare(stream("visual"))
    assert verify(cache) == []
    assert_same(dict(cache.read("visual", "é").arrays), arrays(stream("visual"), seed=0))


def test_repair_restores_a_manifest(path, store):
    for data in (b"{}x", None):
        if data is None:
            (path / "manifest.json").unlink()
        else:
            (path / "manifest.json").write_bytes(data)
        with pytest.raises((CorruptError, UsageError)):
            open_cache(path)
        assert open_for_repair(path).store == store
        read_all(path)


def test_repair_rejects_a_directory_without_a_cache(tmp_path):
    with pytest.raises(UsageError):
        open_for_repair(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_repair_without_write_access_is_a_usage_error(path, monkeypatch):
    manifest = (path / "manifest.json").stat().st_ino
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="no write access"):
        open_for_repair(path)
    assert (path / "manifest.json").stat().st_ino == manifest


def test_repair_removes_only_old_leftovers_of_vaflow(path, monkeypatch):
    cache = open_cache(path, writable=True)
    attempt = path / "visual" / "é-killed" / "0123456789abcdef"
    attempt.mkdir(parents=True)
    (attempt / "zarr.json").write_text("{}")
    temporary = path / "records" / "visual" / ".tmp-1234"
    temporary.write_text("half a rec")
    notes = path / "visual" / "%C3%A9" / "notes.txt"
    notes.write_text("mine")
    (path / "backup").mkdir()
    (path / "backup" / "fedcba9876543210").mkdir()
    assert leftovers(cache) == [temporary, attempt]
    assert leftovers(cache, 3600) == []
    repair(cache)
    assert attempt.exists()
    assert temporary.exists()
    monkeypatch.setattr("vaflow.cache.maintenance.GRACE", 0.0)
    repair(cache)
    assert not attempt.exists()
    assert not temporary.exists()
    assert notes.exists()
    assert (path / "backup" / "fedcba9876543210").exists()
    read_all(path)


def test_verify_reports_arrays_that_violate_the_schema(path, monkeypatch):
    """A writer that violates the schema: valid checksums, invalid contents."""
    cache = open_cache(path, writable=True)
    wrong = arrays(stream("visual"))
    wrong["time"] = wrong["time"][::-1].copy()
    with monkeypatch.context() as patch:
        patch.setattr("vaflow.cache.cache.array_problems", lambda *_: [])
        cache.write("visual", "wrong", wrong)
    problems = verify(cache)
    assert [(problem.item, problem.message) for problem in problems] == [("wrong", "time does not ascend")]


def test_reading_without_verification_detects_missing_files(path):
    cache = open_cache(path)
    file = sorted(cache.record("visual", "zeros").files)[0]
    (path / "visual" / "zeros" / file).unlink()
    with pytest.raises(CorruptError):
        cache.read("visual", "zeros", verify=False)


def test_verify_checks_a_cache_of_zeros(tmp_path, store):
    """Zarr omits all-zero chunks by default, so a deleted chunk would read as zeros."""
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(stream("visual"))
    cache.write("visual", "zeros", arrays(stream("visual"), zeros=True))
    files = [p for p in (cache.path / "visual").rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert sum(p.stat().st_size for p in files) >= sum(a.nbytes for a in arrays(stream("visual")).values())
