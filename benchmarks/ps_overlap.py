"""
What pushing parts behind backward saves: whole training steps with `overlap: true` and `false`.

Two workers, an MLP of 10.5 M parameters (that of `ring_step.py`), SGD with momentum. "two nodes":
all workers on one node of a local Ray cluster, all servers on the other, so both share the cores of
this machine. With as many workers as cores what servers do meanwhile is taken from backward.
"""

import argparse
from functools import partial
from typing import Any

import ray
from common import WORKERS, alternately, print_ratio
from ray.cluster_utils import Cluster
from ring_step import ours

GOAL = 1.0
LEFT = {"scaling": {"num_workers": WORKERS, "resources_per_worker": {"CPU": 1, "left": 1}}}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "one node": ({"name": "ps-sync"}, "left", {}),
    "two nodes": ({"name": "ps-sync"}, "right", {}),
    "two nodes, clipped": ({"name": "ps-sync"}, "right", {"clip_norm": 1e3}),
    "two nodes, ps-async": ({"name": "ps-async"}, "right", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    node: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 1 << 30}
    head = {**node, "resources": {"left": 9}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node, resources={"right": 9})
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    for servers in args.servers:
        for case in args.cases:
            strategy, side, fields = CASES[case]
            where = {"num_servers": servers, "resources_per_server": {side: 1}}
            sides = [
                partial(
                    ours,
                    {**strategy, **where, "overlap": overlap},
                    args.steps,
                    "mlp",
                    **LEFT,
                    **fields,
                )
                for overlap in (True, False)
            ]
            mine, other = alternately(sides[0], sides[1], args.rounds)
            print_ratio(f"{case}, {servers} servers, overlap", mine, other, GOAL)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
