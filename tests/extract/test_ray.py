"""`--engine ray` on a local two-node cluster: identical results, recovery from deaths, Ctrl-C.

What the driver does when members die again and again is tested without Ray in test_ray_team.py.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import pytest
from test_pipeline import same_arrays
from test_resume import command
from test_same_bits import STREAMS, WHOLE, dataset, reference

from vaflow.cache import open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.extract.pipeline import extract

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

__all__ = ["dataset", "reference"]  # fixtures
CONFIG = replace(WHOLE, workers=1)  # two CPUs per member: one member on each node


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head with two CPUs; nodes can be added and killed."""
    from ray.cluster_utils import Cluster

    from vaflow.extract.ray_engine import import_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import_ray()  # quiet
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_two_nodes_give_the_results_of_one_process(
    cluster: object, dataset: Dataset, reference: object, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2)  # type: ignore[attr-defined]
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    clips = (*dataset.clips, replace(dataset.clips[0], id="broken", video=broken))
    out, address = tmp_path / "cache", cluster.address  # type: ignore[attr-defined]
    summary = extract(replace(dataset, clips=clips), out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (summary.extracted, summary.done) == (7, 0)
    same_arrays(reference, open_cache(out), STREAMS)  # type: ignore[arg-type]
    assert [json.loads(line)["item"] for line in (out / "failures.jsonl").read_text().splitlines()] == ["broken"]
    faces = sum(int(open_cache(out).read("clip-tiny", item).valid.sum()) for item in open_cache(out).items())
    assert summary.encoded["clip-tiny"] == faces, "rows of all nodes, each once"

    again = extract(dataset, out, CONFIG, store="hdf5", engine="ray", ray_address=address)
    assert (again.extracted, again.done) == (0, 7)


@pytest.mark.parametrize("victim", ["actor", pytest.param("node", marks=pytest.mark.slow)])
def test_a_node_death_loses_only_running_items(victim: str, cluster: object, clips: Path, tmp_path: Path) -> None:
    """A node or an actor is killed: no item is lost, and committed items are not repeated."""
    node = cluster.add_node(num_cpus=2)  # type: ignore[attr-defined]
    for k in range(16):
        (tmp_path / f"clip{k:02d}.mp4").write_bytes((clips / ("single_face.mp4", "carphone.mp4")[k % 2]).read_bytes())
    out, records = tmp_path / "cache", {}

    def strike() -> None:
        while len(list(out.glob("records/labels/*.json"))) < 3:
            time.sleep(0.02)
        if victim == "node":
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
    assert 3 <= len(records) < 16
    assert (summary.extracted, summary.failures) == (16, [])
    now = {p.name: json.loads(p.read_text())["attempt"] for p in out.glob("records/labels/*.json")}
    assert len(now) == 16
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


def test_ctrl_c_exits_130_and_leaves_no_process(clips: Path, tmp_path: Path) -> None:
    for k in range(12):
        (tmp_path / f"clip{k:02d}.mp4").write_bytes((clips / "single_face.mp4").read_bytes())
    out, mark = tmp_path / "cache", token_hex(8)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*command(tmp_path, out), "--engine", "ray", "--ray-address", "local"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"VAFLOW_TEST_MARK": mark},
    )
    while len(list(out.glob("records/labels/*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "vaflow: interrupted. Run the same command again to resume."
    assert printed == ""
    assert 2 <= len(open_cache(out).items()) < 12
    deadline = time.monotonic() + 30
    while alive := marked(mark):
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def marked(mark: str) -> list[str]:
    """Command lines of processes that carry a mark in their environment."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                pids.append((folder / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return pids
