"""From a request to what Ray is given, as plain data: pure functions, without Ray.

    request ──▶ RayJob: an entrypoint (our driver, with its orders as JSON) and a runtime environment (our package)
                  driver ──▶ one bundle of resources a node ──▶ a worker in each, which starts the node's ranks

A node's ranks share a bundle, so no placement can part them. Nodes of attention servers may have bundles of another kind.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import distattn
from distattn.errors import ConfigError
from distattn.launchers.request import JobRequest

PACKAGE = str(Path(distattn.__file__).resolve().parent)


@dataclass(frozen=True)
class Orders:
    """What the driver does. command: of each rank, behind the interpreter that the node's worker runs on; counts: numbers of
    nodes that an attempt may have, largest first; bundle: resources of each node's ranks; server_bundle: of each node of
    attention servers, empty where these have no bundles of their own; server_nodes, context_nodes: of every context_nodes
    nodes in a row, the last server_nodes are such nodes; port: 0 takes a free one."""

    job: str
    command: tuple[str, ...]
    run_dir: str
    working_dir: str
    counts: tuple[int, ...]
    ranks_per_node: int
    bundle: dict[str, float]
    env: dict[str, str]
    max_restarts: int
    port: int
    server_bundle: dict[str, float] = field(default_factory=dict)
    server_nodes: int = 0
    context_nodes: int = 0

    def is_server(self, node: int) -> bool:
        """Whether this node of an attempt is one of attention servers, with a bundle of their kind."""
        return bool(self.server_bundle) and node % self.context_nodes >= self.context_nodes - self.server_nodes

    def bundles(self, count: int) -> list[dict[str, float]]:
        """Resources of each node of an attempt of so many."""
        return [self.server_bundle if self.is_server(node) else self.bundle for node in range(count)]

    def dumps(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=True)

    @classmethod
    def loads(cls, text: str) -> Orders:
        values = json.loads(text)
        return cls(**values | {"command": tuple(values["command"]), "counts": tuple(values["counts"])})


@dataclass(frozen=True)
class RayJob:
    """Arguments of Ray's ``submit_job``."""

    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def orders(request: JobRequest, job: str) -> Orders:
    """What the driver of a run is told."""
    return Orders(
        job=job,
        command=request.command()[1:],
        run_dir=request.run_dir,
        working_dir=request.working_dir,
        counts=request.node_counts or (request.nodes,),
        ranks_per_node=request.ranks_per_node,
        bundle=bundle(request),
        env=dict(request.env),
        max_restarts=request.max_restarts,
        port=request.port,
        server_bundle=dict(request.server_resources),
        server_nodes=request.server_nodes,
        context_nodes=request.context_nodes,
    )


def ray_job(request: JobRequest, told: Orders, submission_id: str) -> RayJob:
    """The job that carries these orders, under an id that no other job of the cluster has. Ray runs an entrypoint in a shell,
    so every word of it is quoted."""
    words = [request.python, "-P", "-m", "distattn.launchers.ray_driver", told.dumps()]
    # The package alone travels: what lies beside it (runs, data, secrets) is nobody's business.
    runtime_env = {"py_modules": [PACKAGE], "env_vars": {"PYTHONSAFEPATH": "1"}, "excludes": ["**/__pycache__"]}
    metadata = {"name": request.name, "run_dir": told.run_dir}
    return RayJob(submission_id, shlex.join(words), runtime_env, metadata)


def submit_patiently(submit: Callable[..., str], job: Mapping[str, Any], patience_s: float = 120.0) -> str:
    """``submit(**job)``, again while the cluster says that it is not ready yet; the job's id."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return submit(**job)
        except RuntimeError as error:
            # A cluster answers before its agents, one of which starts the job, do.
            if "try again" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def bundle(request: JobRequest) -> dict[str, float]:
    """Resources that a node's ranks hold together."""
    resources = {"CPU": float(request.ranks_per_node * max(request.cpus_per_rank, 1))}
    if request.gpus_per_node:
        resources["GPU"] = float(request.gpus_per_node)
    return resources


def choose_count(told: Orders, free: Sequence[Mapping[str, float]]) -> int:
    """The largest number of nodes that an attempt may have whose bundles fit on nodes with these resources; 0 if none does."""
    return next((count for count in told.counts if fits(told.bundles(count), free)), 0)


def fits(bundles: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]) -> bool:
    """Whether the bundles find room, those of the scarcer kind first, each on the node that has least to spare."""
    left = [dict(node) for node in free]

    def rooms(bundle: Mapping[str, float]) -> list[dict[str, float]]:
        return [node for node in left if all(node.get(name, 0.0) >= amount for name, amount in bundle.items())]

    for bundle in sorted(bundles, key=lambda bundle: len(rooms(bundle))):
        room = rooms(bundle)
        if not room:
            return False
        node = min(room, key=lambda node: sum(node.values()))
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def cancel_mark(run_dir: str | Path, job: str) -> Path:
    """The file whose presence asks the ranks of a job to write a checkpoint and end."""
    return Path(run_dir) / "logs" / f"{job}.cancel"


def jobs_address(address: str) -> str:
    """The address of a cluster's dashboard, where Ray takes jobs; ConfigError for another kind of address."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--ray-address {address!r} is not the address of a Ray dashboard: write for instance http://head-node:8265 "
            "(jobs are submitted there; ray:// and port 6379 are for programs that run beside the cluster)."
        )
    return address.rstrip("/")


def ports(request: JobRequest) -> str:
    """The ports that a job opens, as comment lines."""
    meeting = str(request.port) if request.port else "a free port"
    if request.ray_address:
        lines = [
            f"TCP {meeting} on the first node, every interface: where ranks meet",
            "TCP, a free port a rank: data between ranks (gloo; NCCL where there are GPUs)",
            f"none of Ray's own: the cluster at {request.ray_address} is there already",
        ]
    else:
        lines = [
            "TCP, a free port a rank on 127.0.0.1: data between ranks, which meet in a file",
            "TCP, free ports on 127.0.0.1: a Ray cluster for this job alone, which asks for its token, and its dashboard",
        ]
    return "\n".join(["# ports:", *(f"#   {line}" for line in lines)])


def preview(request: JobRequest) -> str:
    """Exactly what would be submitted, for people; ``JOB`` stands for the number that a job gets."""
    where = f"to {jobs_address(request.ray_address)}" if request.ray_address else "to a cluster on this machine, started for it"
    told = orders(request, "ray-JOB")
    kinds = Counter(map(json.dumps, told.bundles(request.nodes)))
    bundles = "".join(f"# {number} nodes, each a bundle of {kind}, spread over the cluster\n" for kind, number in kinds.items())
    job = ray_job(request, told, "distattn-JOB")
    shown = {"submission_id": job.submission_id, "entrypoint": job.entrypoint, "metadata": job.metadata}
    shown["runtime_env"] = job.runtime_env
    return f"{ports(request)}\n{bundles}# job {where}:\n{json.dumps(shown, ensure_ascii=False, indent=1)}\n"
