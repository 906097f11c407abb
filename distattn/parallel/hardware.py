"""What the cost model assumes of a machine: kernel rates, link rates and latencies, ranks per node.

Rates of links are per rank and direction. Ranks fill nodes in order: rank r sits on node ``r // ranks_per_node``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from distattn.calibration import Calibration, KernelCell, KernelRate, load_calibration
from distattn.errors import ConfigError
from distattn.kernels.selection import Rates, shipped_rates

MEASURED = "measured"
"""The hardware that ``distattn bench calibrate`` found here."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes; one rank drives one device.

    forward_tflops, backward_tflops: what an attention kernel sustains at long lengths, 10^12 FLOP/s per rank.
    inside_gb_per_second, between_gb_per_second: 10^9 bytes/s that a rank sends (and at once receives) in and across nodes.
    inside_latency_us, between_latency_us: from posting a message to its first byte.
    launch_us: start of the kernels of one stage. copy_gb_per_second: at which a device reads and writes its own memory, for
    merging what arrives; infinite: not counted. kernels: measured rates, which then take the place of tflops and launch_us;
    cells: single times that correct them near what was timed; calibration: their digest, so that ranks can compare what they
    predict with. needs_out: the backward kernels read the forward's output, which travels where queries do. host_exchange_us,
    host_message_us, host_launch_us: what the host takes to post an exchange, for each Move that it packs for another rank or
    takes from one, and to start a kernel or a merge; host_ahead_us: how far it is ahead of the device when a call begins, as in
    the middle of a training step.
    """

    name: str
    ranks_per_node: int
    forward_tflops: float
    backward_tflops: float
    inside_gb_per_second: float
    between_gb_per_second: float
    inside_latency_us: float
    between_latency_us: float
    launch_us: float
    copy_gb_per_second: float = math.inf
    host_exchange_us: float = 0.0
    host_message_us: float = 0.0
    host_launch_us: float = 0.0
    host_ahead_us: float = 0.0
    kernels: tuple[KernelRate, ...] = field(default=(), repr=False)
    cells: tuple[KernelCell, ...] = field(default=(), repr=False)
    calibration: str = ""
    needs_out: bool = False

    def __post_init__(self) -> None:
        rates = (
            "ranks_per_node", "forward_tflops", "backward_tflops", "inside_gb_per_second", "between_gb_per_second",
            "copy_gb_per_second",
        )  # fmt: skip
        for rate in rates:
            if not getattr(self, rate) > 0:
                raise ConfigError(f"hardware {self.name}: {rate} must be positive, got {getattr(self, rate)}")
        host = ("host_exchange_us", "host_message_us", "host_launch_us", "host_ahead_us")
        for time in ("inside_latency_us", "between_latency_us", "launch_us", *host):
            if not getattr(self, time) >= 0:
                raise ConfigError(f"hardware {self.name}: {time} must not be negative, got {getattr(self, time)}")

    @cached_property
    def rates(self) -> Rates:
        """Of its kernels, as the choice among them has them."""
        return Rates(Calibration(self.name, kernels=self.kernels, cells=self.cells), self.name)

    @cached_property
    def rates_key(self) -> int:
        """Equal where the rates of kernels are."""
        return hash((self.kernels, self.cells))

    def rated(self, kernel: str) -> str | None:
        """This backend if its rates are among those of both directions, by which a plan that names it is predicted, else None:
        the fastest of those that were measured stands for it."""
        known = {rate.backward for rate in self.kernels if rate.backend == kernel}
        return kernel if known == {False, True} else None

    def flops_per_second(self, *, backward: bool) -> float:
        return (self.backward_tflops if backward else self.forward_tflops) * 1e12

    def crosses_nodes(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Whether messages between these ranks leave their node, bool, shaped as the int64 inputs."""
        return np.asarray(src) // self.ranks_per_node != np.asarray(dst) // self.ranks_per_node

    def transfer_seconds(self, src: np.ndarray, dst: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
        """Time of each message on links that carry nothing else, float64, shaped as the inputs."""
        between = self.crosses_nodes(src, dst)
        latency = np.where(between, self.between_latency_us, self.inside_latency_us) * 1e-6
        return latency + num_bytes / (np.where(between, self.between_gb_per_second, self.inside_gb_per_second) * 1e9)


# Kernel rates. H100, H200: cuDNN, causal, bf16, 32K tokens, head_dim 128, heads 64:8 (charts of SandAI-org/MagiAttention
# v1.1.1, read to ±5). A100: the best case of FlashAttention-2 (arXiv 2307.08691): 73 % and 63 % of 312 TFLOP/s.
# CPU: torch 2.13's flash kernel, fp32, head_dim 64, 2,048 tokens on one core of an AMD EPYC.
# Links. NVLink 4 and 3 carry 450 and 300 GB/s a direction and GPU, ConnectX-7 and -6 carry 50 and 25 GB/s (NVIDIA's data
# sheets); taken at 80 % and 90 %. Loopback, latencies and launches are assumptions. The H100's host: fitted to what it took
# beside two H200 and two and four H100 (host_ms in benchmarks/results/context-h*00-*.json), with all kernels and NCCL; its head
# start is 3.3 ms, less 1.4 ms that a call takes whatever it does.
_NVLINK_SHARE, _NIC_SHARE = 0.8, 0.9
_H100 = Hardware(
    name="h100",
    ranks_per_node=8,
    forward_tflops=607,
    backward_tflops=517,
    inside_gb_per_second=450 * _NVLINK_SHARE,
    between_gb_per_second=50 * _NIC_SHARE,
    inside_latency_us=10,
    between_latency_us=20,
    launch_us=10,
    host_exchange_us=250,
    host_message_us=260,
    host_launch_us=250,
    host_ahead_us=1900,
    needs_out=True,
)
HARDWARE: dict[str, Hardware] = {
    "cpu": Hardware(
        name="cpu",
        ranks_per_node=1 << 20,  # local runs only: every rank is on this machine
        forward_tflops=0.06,
        backward_tflops=0.04,
        inside_gb_per_second=1,
        between_gb_per_second=1,
        inside_latency_us=200,
        between_latency_us=200,
        launch_us=50,
        needs_out=True,
    ),
    "h100": _H100,
    # The H200 differs in memory only; attention at long lengths is bound by arithmetic.
    "h200": replace(_H100, name="h200"),
    "a100": Hardware(
        name="a100",
        ranks_per_node=8,
        forward_tflops=228,
        backward_tflops=197,
        inside_gb_per_second=300 * _NVLINK_SHARE,
        between_gb_per_second=25 * _NIC_SHARE,
        inside_latency_us=10,
        between_latency_us=20,
        launch_us=10,
        needs_out=True,
    ),
}


_COPY_GB_PER_SECOND = {"h100": 3000.0, "h200": 4300.0, "a100": 1500.0}
"""What a copy on the device moves, read and written: the H100 and H200 measured, the A100 at 75 % of its data sheet."""


def find_hardware(name: str) -> Hardware:
    """The preset of this name, or what was measured here; ConfigError lists those there are."""
    if name == MEASURED:
        calibration = load_calibration()
        if calibration is None:
            raise ConfigError("nothing was measured here yet: run `distattn bench calibrate`, or name another hardware")
        return calibrated(calibration)
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}: choose one of {', '.join([*HARDWARE, MEASURED])}")
    return HARDWARE[name]


def hardware_here(*, on_gpu: bool) -> Hardware:
    """What predictions on this machine rest on: its calibration where it has one with links, else a preset."""
    if not on_gpu:
        return HARDWARE["cpu"]
    calibration = load_calibration()
    return HARDWARE["h100"] if calibration is None or not calibration.links else calibrated(calibration)


def calibrated(calibration: Calibration, *, ranks_per_node: int | None = None) -> Hardware:
    """The preset of this kind of device with measured rates in it, as far as there are any.

    ranks_per_node: None takes the preset's, or for the device of one machine as many ranks as its links were measured with.
    """
    family = next((name for name in HARDWARE if name in calibration.device.lower()), "cpu")
    found = replace(
        HARDWARE[family],
        name=f"{MEASURED} {calibration.device}",
        calibration=calibration.digest,
        copy_gb_per_second=_COPY_GB_PER_SECOND.get(family, math.inf),
    )
    for scope in ("inside", "between"):
        # A ring's messages are the ones that have a link to themselves; an all-to-all's are predicted from them.
        links = [x for x in calibration.links if x.scope == scope]
        links.sort(key=lambda x: x.operation != "ring")
        if links:
            rates = {f"{scope}_gb_per_second": links[0].gb_per_second, f"{scope}_latency_us": links[0].latency_us}
            found = replace(found, **rates)
    if ranks_per_node is not None:
        found = replace(found, ranks_per_node=ranks_per_node)
    measured = calibration
    if not calibration.kernels and family in ("h100", "h200"):
        measured = shipped_rates()
    return replace(found, kernels=measured.kernels, cells=measured.cells)
