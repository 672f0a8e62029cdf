"""A local Ray cluster of two nodes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vaflow.process import import_ray


@contextmanager
def two_nodes(cpus: int) -> Iterator[object]:
    """Yield a cluster of two nodes with `cpus` CPUs each; more can be added and removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart"):
            patch.setenv(name, "0")  # idle workers that our actors, with an environment of their own, never use
        ray = import_ray()  # quiet
        from ray.cluster_utils import Cluster

        bare = {"num_cpus": cpus, "include_log_monitor": False}  # fewer processes that import
        cluster = Cluster(initialize_head=True, head_node_args=bare | {"include_dashboard": False, "no_monitor": True})
        cluster.add_node(**bare)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
