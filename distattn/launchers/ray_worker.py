"""A node's part of an attempt on Ray: meets the other nodes, then starts and watches the node's ranks.

Ray Train ──a worker a node──▶ run_node ─────┬─run_local──▶ rank processes (die with the worker, and it with its node)
driver ──an actor a server node──▶ ServerNode ┘

All workers of Ray Train have the same resources, so nodes of attention servers, where they have bundles of another kind, are
actors of the driver. They are told where ranks meet when the workers are.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from distattn.errors import LaunchError
from distattn.launchers.local import NodeShare, meet_on_loopback, run_local
from distattn.launchers.ray_spec import Orders, cancel_mark
from distattn.launchers.supervise import RESTART_VARIABLE, Failure, Journal, step_being_computed

_MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", *meet_on_loopback(""))


@dataclass
class NodeRendezvous(TorchConfig):
    """Tells the workers where their ranks meet. The process group is the ranks' own, so none is made among the workers.

    port: 0 takes a free one. servers: the nodes of attention servers that have bundles of their own.
    """

    port: int = 0
    servers: tuple[Any, ...] = ()

    @property
    def backend_cls(self) -> Any:  # the parent's type is of a private class
        return _NodeBackend


class _NodeBackend(Backend):
    share_cuda_visible_devices = False

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        meeting = worker_group.execute_single(0, meeting_point, backend_config.port)
        worker_group.execute(_set_meeting_point, meeting)
        for server in backend_config.servers:
            server.run.remote(meeting)


def meeting_point(port: int) -> dict[str, str]:
    """On the first worker: the variables that say where ranks meet. A cluster of one machine opens no port to others."""
    address = ray.util.get_node_ip_address()
    if address.startswith("127."):
        return meet_on_loopback(Path(tempfile.mkdtemp(prefix="distattn-")) / "store")
    if not port:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _set_meeting_point(meeting: dict[str, str]) -> None:
    os.environ.update(meeting)


def run_node(config: dict[str, Any]) -> None:
    """Start the ranks of this worker's node and wait; LaunchError if one fails."""
    told: Orders = Orders.loads(config["orders"])
    # Which of the nodes that hold rows this is.
    trainers = [node for node in range(config["count"]) if not told.is_server(node)]
    node = trainers[ray.train.get_context().get_world_rank()]
    meeting = {name: os.environ[name] for name in _MEETING_VARIABLES if name in os.environ}
    run_ranks_of_node(told, node, config["count"], meeting)


class ServerNode:
    """An actor: a node of attention servers, with a bundle of their own."""

    def __init__(self, orders: str, node: int, count: int) -> None:
        self._told, self._node, self._count = Orders.loads(orders), node, count

    def run(self, meeting: dict[str, str]) -> None:
        """As ``run_node``. What fails is in the run's journal; nobody looks at the result."""
        run_ranks_of_node(self._told, self._node, self._count, meeting)

    def is_there(self) -> bool:
        """Answers once ``run`` has ended, since an actor does one thing at a time."""
        return True


def run_ranks_of_node(told: Orders, node: int, num_nodes: int, meeting: dict[str, str]) -> None:
    """Start the ranks of one node of an attempt and wait; LaunchError, and a line in the run's journal, if one fails."""
    os.chdir(told.working_dir)
    mark = cancel_mark(told.run_dir, told.job)
    each = told.ranks_per_node
    ended = run_local(
        [sys.executable, *told.command],
        each,
        log_dir=Path(told.run_dir) / "logs",
        env={**told.env, RESTART_VARIABLE: "noted"},
        share=NodeShare(node * each, num_nodes * each, meeting),
        asked_to_stop=mark.exists,
    )
    if ended.status:
        message = ended.message.splitlines()[0]
        step = step_being_computed(told.run_dir)
        Journal(told.run_dir).failed(Failure(step, ended.kind, message, ended.failed_rank))
        raise LaunchError(f"on node {node} of {num_nodes}, {message}")
