"""`--engine ray` on a local two-node cluster: identical results, recovery from deaths, Ctrl-C.

What the driver does when members die again and again is tested without Ray in test_ray_team.py.
"""

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

import pytest
from lab import TINY, Ended, Lab, until
from tiny_extraction import STREAMS, WHOLE, assert_same_arrays
from two_nodes import two_nodes

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.extract.pipeline import extract

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

CONFIG = replace(WHOLE, workers=1)  # two CPUs per member: one member on each node


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with two_nodes(2) as cluster:
        yield cluster


def test_two_nodes_give_the_results_of_one_process(
    cluster: object, seven_clips: Dataset, seven_clips_cache: Cache, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    clips = (*seven_clips.clips, replace(seven_clips.clips[0], id="broken", video=broken))
    out, address = tmp_path / "cache", cluster.address  # type: ignore[attr-defined]
    summary = extract(replace(seven_clips, clips=clips), out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (summary.extracted, summary.done) == (7, 0)
    assert_same_arrays(seven_clips_cache, open_cache(out), STREAMS)
    assert [json.loads(line)["item"] for line in (out / "failures.jsonl").read_text().splitlines()] == ["broken"]
    faces = sum(int(open_cache(out).read("clip-tiny", item).valid.sum()) for item in open_cache(out).items())
    assert summary.encoded["clip-tiny"] == faces, "rows of all nodes, each once"

    again = extract(seven_clips, out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (again.extracted, again.done) == (0, 7)


@pytest.mark.parametrize("victim", ["actor", pytest.param("node", marks=pytest.mark.slow)])
def test_a_node_death_loses_only_running_items(victim: str, cluster: object, clips: Path, tmp_path: Path) -> None:
    """A node or an actor is killed: no item is lost, and committed items are not repeated."""
    for k in range(12):
        (tmp_path / f"clip{k:02d}.mp4").write_bytes((clips / ("single_face.mp4", "carphone.mp4")[k % 2]).read_bytes())
    out, records = tmp_path / "cache", {}

    def strike() -> None:
        while len(list(out.glob("records/labels/*.json"))) < 3:
            time.sleep(0.02)
        if victim == "node":
            [*_, node] = cluster.worker_nodes  # type: ignore[attr-defined]
            cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
        else:
            os.kill(actors()[0], signal.SIGKILL)
        records.update({p.name: json.loads(p.read_text())["attempt"] for p in out.glob("records/labels/*.json")})

    killer = threading.Thread(target=strike)
    killer.start()
    data = open_dataset(tmp_path, "videos")
    config = replace(CONFIG, visual=("clip-tiny",), audio=())
    summary = extract(data, out, config, engine="ray", ray_address=cluster.address)  # type: ignore[attr-defined]
    killer.join()
    assert 3 <= len(records) < 12
    assert (summary.extracted, summary.failures) == (12, [])
    now = {p.name: json.loads(p.read_text())["attempt"] for p in out.glob("records/labels/*.json")}
    assert len(now) == 12
    assert records.items() <= now.items()


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
    process = lab.start(["extract", data, "--out", out, *TINY, *ray_options], environment)
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
