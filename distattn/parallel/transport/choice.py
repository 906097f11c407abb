"""Which transport a group takes, and why: a collective (NCCL, gloo), or symmetric memory where it measured faster."""

from __future__ import annotations

import torch.distributed as dist

from distattn.calibration import LinkRate, load_calibration
from distattn.errors import PlanError
from distattn.parallel.per_group import PerGroup
from distattn.parallel.transport.collective import Collective, group_device
from distattn.parallel.transport.symmetric import Symmetric, why_not

TRANSPORTS = {"collective": Collective, "symmetric": Symmetric}

MESSAGE_BYTES = 16 << 20
"""At which measured rates are compared: keys and values of some thousand tokens."""

_choices: PerGroup[dict[str, tuple[str, str]]] = PerGroup()


def choose_transport(group: dist.ProcessGroup, name: str = "auto") -> tuple[str, str]:
    """(a name of TRANSPORTS, why); found once for each group. PlanError: the named one does not serve this group."""
    known = _choices.setdefault(group, {})
    if name not in known:
        known[name] = _chosen(group, name)
    return known[name]


def make_transport(group: dist.ProcessGroup, name: str, timeout_s: float | None) -> Collective:
    """A transport by its name in TRANSPORTS."""
    return TRANSPORTS[name](group, timeout_s=timeout_s)


def _chosen(group: dist.ProcessGroup, name: str) -> tuple[str, str]:
    if name not in ("auto", *TRANSPORTS):
        raise PlanError(f"transport={name!r} is unknown; it may be auto, {', '.join(TRANSPORTS)}")
    obstacle = why_not(group)
    if name == "symmetric" and obstacle:
        raise PlanError(f"transport='symmetric' cannot serve this group: {obstacle}; use transport='auto'")
    if name != "auto":
        return name, "given"
    backend = "NCCL" if group_device(group).type == "cuda" else "gloo"
    if obstacle:
        return "collective", f"{backend}: {obstacle}"
    calibration = load_calibration()
    rates = {x.operation: x for x in (calibration.links if calibration else ()) if x.scope == "inside"}
    if "ring" not in rates or "symmetric" not in rates:
        return "collective", f"{backend}: `distattn bench calibrate` has not compared it with symmetric memory here"
    ours, theirs = (1e6 * seconds(rates[x], MESSAGE_BYTES) for x in ("symmetric", "ring"))
    faster = "symmetric" if ours < theirs else "collective"
    return faster, f"16 MiB measured in {ours:.0f} µs through symmetric memory, in {theirs:.0f} µs through {backend}"


def seconds(rate: LinkRate, num_bytes: int) -> float:
    """Of one message, by its measured line."""
    return 1e-6 * rate.latency_us + num_bytes / (1e9 * rate.gb_per_second)
