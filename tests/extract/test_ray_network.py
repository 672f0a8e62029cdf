"""What a local Ray opens: ports on the loopback interface only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

PROGRAM = """
import os
from vaflow.extract.ray_engine import connected, import_ray

def listening():
    # state 0A of /proc/net/tcp is LISTEN
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(table).read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(fields[1])
    return found

before = listening()
ray = import_ray(loopback=True)
with connected(ray, None):
    new = listening() - before
print("\\n".join(sorted(new)))
"""


def test_a_local_ray_listens_on_loopback_only(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    addresses = [line.rpartition(":")[0] for line in done.stdout.split()]
    assert addresses, "Ray listens somewhere"
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert [address for address in addresses if address not in loopback] == []
