"""`--engine ray` on a local cluster of two nodes: extraction, ablation, search and Ctrl-C.

One cluster serves all tests: each of its processes imports for seconds. What a driver does when actors die again and
again is tested without Ray in extract/test_ray_team.py.
"""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from ablation_toys import toy_study
from lab import Ended, Lab, until
from make_media import AudioTrack, VideoTrack, tones, write_media
from synthetic_cache import Toy, make_cache
from tiny_extraction import assert_same_arrays
from two_nodes import two_nodes

from vaflow.cache import Cache, open_cache
from vaflow.cli import main
from vaflow.datasets import Dataset, open_dataset
from vaflow.errors import UsageError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.train.ablate.pool import Outcome, run_all
from vaflow.train.ablate.tables import Options, ScheduledRun, make_schedule

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

# Encoders that need no further library: each actor imports again, and CLIP and AST would take as long as torch.
CONFIG = ExtractConfig(visual=("resnet-tiny",), audio=("vggish-tiny",), device="cpu", workers=1, face_source="none")
STREAMS = ["labels", "logmel", "resnet-tiny", "vggish-tiny"]
LIGHT = ["--visual", "resnet-tiny", "--audio", "vggish-tiny", "--device", "cpu", "--faces", "none"]
CLIPS = 10


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with two_nodes(1) as cluster:
        yield cluster


@pytest.fixture
def cluster(nodes: Any) -> object:
    """Two nodes with one CPU each: one actor on each node. A node that a test has removed is replaced."""
    if not nodes.worker_nodes:
        nodes.add_node(num_cpus=1)
    return nodes


def remove_a_node(cluster: object) -> None:
    [*_, node] = cluster.worker_nodes  # type: ignore[attr-defined]
    cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]


# -- extraction --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten_clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Clips of two to four seconds, and one that cannot be read."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        seconds = 2.0 + number / 5
        audio_track = AudioTrack(tones(seconds, 16000) * (number + 1) / 10, 16000)
        write_media(
            root / f"clip{number}.mp4", VideoTrack(tuple(range(0, int(seconds * 1000), 200)), noise=30), audio_track
        )
    (root / "broken.mp4").write_text("no video")
    return open_dataset(root, "videos")


@pytest.fixture(scope="module")
def extracted_here(ten_clips: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """What one process extracts."""
    out = tmp_path_factory.mktemp("reference") / "cache"
    assert extract(ten_clips, out, CONFIG).extracted == CLIPS
    return open_cache(out)


def failed(cache: Path) -> list[str]:
    return [json.loads(line)["item"] for line in (cache / "failures.jsonl").read_text().splitlines()]


@pytest.mark.slow  # the next test compares the same arrays
def test_two_nodes_give_the_results_of_one_process(
    cluster: object, ten_clips: Dataset, extracted_here: Cache, tmp_path: Path
) -> None:
    out, address = tmp_path / "cache", cluster.address  # type: ignore[attr-defined]
    summary = extract(ten_clips, out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (summary.extracted, summary.done, failed(out)) == (CLIPS, 0, ["broken"])
    assert_same_arrays(extracted_here, open_cache(out), STREAMS)
    faces = sum(int(open_cache(out).read("resnet-tiny", item).valid.sum()) for item in open_cache(out).items())
    assert summary.encoded["resnet-tiny"] == faces, "rows of all nodes, each once"

    again = extract(ten_clips, out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (again.extracted, again.done) == (0, CLIPS)


@pytest.mark.parametrize("victim", ["actor", pytest.param("node", marks=pytest.mark.slow)])
def test_a_death_loses_only_running_items(
    victim: str, cluster: object, ten_clips: Dataset, extracted_here: Cache, tmp_path: Path
) -> None:
    """No item is lost, committed items are not repeated, and the bits are those of one process."""
    out, records = tmp_path / "cache", {}

    def attempts() -> dict[str, str]:
        return {path.name: json.loads(path.read_text())["attempt"] for path in out.glob("records/labels/*.json")}

    def strike() -> None:
        while len(list(out.glob("records/labels/*.json"))) < 3:
            time.sleep(0.01)
        if victim == "node":
            remove_a_node(cluster)
        else:
            os.kill(actors()[0], signal.SIGKILL)
        records.update(attempts())

    killer = threading.Thread(target=strike)
    killer.start()
    address = cluster.address  # type: ignore[attr-defined]
    summary = extract(ten_clips, out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    killer.join()
    assert 3 <= len(records) < CLIPS
    assert (summary.extracted, failed(out)) == (CLIPS, ["broken"])
    assert len(attempts()) == CLIPS
    assert records.items() <= attempts().items()
    assert_same_arrays(extracted_here, open_cache(out), STREAMS)


def actors() -> list[int]:
    """Process ids of this cluster's members."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _ancestor(int(folder.name)):
            try:
                if b"ray::Member" in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue
    return pids


def _ancestor(pid: int) -> bool:
    """Whether this test process is an ancestor of a process."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


@dataclass(frozen=True)
class Interrupted:
    """An extraction on a Ray of its own that Ctrl-C has ended.

    Attributes:
        ended: exit code and output of the command.
        addresses: on which its processes listened, in hexadecimal.
        cache: what it wrote.
        mark: in the environment of the processes of Ray.
    """

    ended: Ended
    addresses: set[str]
    cache: Path
    mark: str


@pytest.fixture(scope="module")
def interrupted(lab: Lab, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    data, out = (tmp_path_factory.mktemp("interrupted") / name for name in ("data", "cache"))
    data.mkdir()
    for k in range(12):
        (data / f"clip{k:02d}.mp4").write_bytes((clips / "single_face.mp4").read_bytes())
    mark = token_hex(8)
    environment = f"import os; os.environ.pop('RAY_ADDRESS', None); os.environ['VAFLOW_TEST_MARK'] = {mark!r}; "
    environment += "os.environ['RAY_prestart_worker_first_driver'] = os.environ['RAY_enable_worker_prestart'] = '0'"
    ray_options = ["--engine", "ray", "--ray-address", "local", "--quiet", "--workers", "1"]
    process = lab.start(["extract", data, "--out", out, *LIGHT, *ray_options], environment)
    until(process, lambda: len(list(out.glob("records/labels/*.json"))) >= 2)
    addresses = listening([process.pid, *marked(mark)])
    process.send(signal.SIGINT, group=True)
    return Interrupted(process.wait(), addresses, out, mark)


def test_ctrl_c_exits_130_and_leaves_no_process(interrupted: Interrupted) -> None:
    assert interrupted.ended.code == 130
    assert interrupted.ended.err.strip() == "vaflow: interrupted. Run the same command again to resume."
    assert interrupted.ended.out == ""
    assert 2 <= len(open_cache(interrupted.cache).items()) < 12
    deadline = time.monotonic() + 30
    while alive := marked(interrupted.mark):
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def test_a_local_ray_listens_on_loopback_only(interrupted: Interrupted) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert interrupted.addresses, "Ray listens on some port"
    assert interrupted.addresses <= loopback


def listening(processes: list[int]) -> set[str]:
    """Addresses of the TCP sockets on which processes listen, in hexadecimal."""
    inodes = set()
    for number in processes:
        with suppress(OSError):  # the process ends
            inodes |= {str(file.readlink()) for file in Path(f"/proc/{number}/fd").iterdir()}
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for fields in map(str.split, Path(table).read_text().splitlines()[1:]):
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # state LISTEN
                addresses.add(fields[1].rpartition(":")[0])
    return addresses


def marked(mark: str) -> list[int]:
    """Processes with a mark in their environment."""
    processes = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                processes.append(int(folder.name))
    return processes


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ray") / "cache", Toy(seconds=(6, 9)))


@pytest.fixture(scope="module")
def runs(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> list[ScheduledRun]:
    """Five runs; the first is much longer than the others."""
    study = toy_study(tmp_path_factory.mktemp("study"))
    short = make_schedule(cache, study, [], Options(seeds=2, overrides={"device": "cpu"})).runs
    return [replace(short[0], config=replace(short[0].config, epochs=60)), *short[1:5]]


@pytest.fixture(scope="module")
def trained_here(cache: Cache, runs: list[ScheduledRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, trained in this process."""
    out = tmp_path_factory.mktemp("here")
    assert not any(outcome.ended.error for outcome in run_all(runs, cache, out, together="never"))
    return out


def results(out: Path) -> dict[str, bytes]:
    """Contents of the files of runs that hold no duration."""
    names = ("*.safetensors", "config.toml", "metrics.json", "predictions/*/*.csv", "moments.*")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(f"runs/*/{name}")}


@pytest.mark.parametrize("victim", ["actor", pytest.param("node", marks=pytest.mark.slow)])
def test_a_run_whose_actor_dies_continues_elsewhere_with_equal_files(
    victim: str, cluster: object, cache: Cache, runs: list[ScheduledRun], trained_here: Path, tmp_path: Path
) -> None:
    long, outcomes = tmp_path / "runs" / runs[0].key, list[Outcome]()
    options = {"engine": "ray", "ray_address": cluster.address, "together": "never"}  # type: ignore[attr-defined]
    for outcome in run_all(runs, cache, tmp_path, **options):
        outcomes.append(outcome)
        if len(outcomes) == 1:  # the other actor trains the long run
            while not (long / "checkpoint.safetensors").exists():
                time.sleep(0.02)
            if victim == "node":
                remove_a_node(cluster)
            else:
                os.kill(holder_of(long / ".lock"), signal.SIGKILL)
    assert len(outcomes) == len(runs)
    assert [outcome.ended.message for outcome in outcomes if outcome.ended.error] == []
    assert outcomes[0].run != runs[0]
    assert outcomes[-1].run == runs[0] or victim == "node", "either actor may be on the removed node"
    assert results(tmp_path) == results(trained_here) != {}
    assert list(tmp_path.glob(".ray-*")) == [], "the file that shows that nodes share the folder"


def holder_of(file: Path) -> int:
    """The process that has a file open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(link.readlink() == file for link in (process / "fd").iterdir()):
                return int(process.name)
    raise AssertionError(f"no process has {file} open")


@pytest.mark.slow  # its runs are those of `run_all` above
def test_a_search_on_two_nodes_finds_the_same_trials(
    cluster: object, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "space.toml").write_text("epochs = 3\nhidden = 8\nlr = { low = 1e-4, high = 3e-2, log = true }\n")
    command = ["search", str(cache.path), "--space", str(tmp_path / "space.toml"), "--folds", "2", "--device", "cpu"]
    command += ["--trials", "4", "--together", "always", "-q"]
    engine = ["--engine", "ray", "--ray-address", cluster.address]  # type: ignore[attr-defined]
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    assert main([*command, "--out", str(tmp_path / "there"), *engine]) == 0
    assert (tmp_path / "there" / "best.toml").read_bytes() == (tmp_path / "here" / "best.toml").read_bytes()
    tables = []
    for name in ("here", "there"):
        with (tmp_path / name / "trials.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4


def test_one_gpu_cannot_be_named(cluster: object, cache: Cache, runs: list[ScheduledRun], tmp_path: Path) -> None:
    named = replace(runs[1], config=replace(runs[1].config, device="cuda:1"))
    with pytest.raises(UsageError, match="remove the number"):
        list(run_all([named], cache, tmp_path, engine="ray", ray_address=cluster.address))  # type: ignore[attr-defined]
