"""A Ray cluster of several nodes on this machine, one of them for attention servers, in a process that a test talks to.

Says one JSON line, {"dashboard": URL}, then obeys lines on its standard input: ``remove PID`` kills the node whose raylet has
that process id, with all that runs on it. Ends, and the cluster with it, when the input does.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from ray.cluster_utils import Cluster

NODES, CPUS = 2, 2
SERVER = "attention_server"
LOOPBACK = "127.0.0.1"


def main() -> None:
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": LOOPBACK, "dashboard_port": port}
    cluster = Cluster()
    add_node(cluster, **head)
    nodes = [add_node(cluster, num_cpus=CPUS) for _ in range(NODES)]
    nodes.append(add_node(cluster, num_cpus=0, resources={SERVER: 1}))
    cluster.wait_for_nodes(timeout=240)
    print(json.dumps({"dashboard": f"http://{LOOPBACK}:{port}"}), flush=True)
    for line in sys.stdin:
        pid = int(line.removeprefix("remove "))
        for node in nodes:
            if node.all_processes["raylet"][0].process.pid == pid:
                cluster.remove_node(node, allow_graceful=False)
                nodes.remove(node)
                break
        print(json.dumps({"nodes": len(nodes)}), flush=True)
    cluster.shutdown()


def add_node(cluster: Cluster, **settings: Any) -> Any:
    """Ray gives a node 30 seconds to start, which a busy machine may not have."""
    for tries_left in (3, 2, 1, 0):
        try:
            # Of its own, for another cluster of this machine may have the usual one; without it a node takes no jobs.
            agent = {"dashboard_agent_listen_port": free_port()}
            return cluster.add_node(wait=False, node_ip_address=LOOPBACK, **agent, **settings)
        except Exception:
            if not tries_left:
                raise
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
