"""``distattn doctor --cluster``: does every device compute, and does every pair of ranks exchange data, at what rate?

doctor ──▶ job of cluster_probe on every rank ──▶ cluster.json ──▶ matrix, rows send and columns receive ──▶ findings
                                                                   └ what is far below its peers, and which nodes to exclude
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time as clock
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distattn.cli.cluster_probe import RESULT, Device, Link
from distattn.errors import ConfigError, LaunchError
from distattn.launchers.local import launch_local
from distattn.launchers.request import JobRequest, parse_env
from distattn.launchers.targets import find_target

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SLOW_LINK, SLOW_DEVICE = 0.5, 0.75
"""A link or device below this share of the median of its peers is a finding."""

_PEERS = 3
"""A median of fewer says nothing."""

_POLL_S = 0.5


@dataclass(frozen=True)
class Finding:
    """What is wrong, in a sentence, and the hosts that it points to."""

    text: str
    hosts: tuple[str, ...]


@app.command()
def cluster(
    cluster: Annotated[bool, typer.Option("--cluster", help="this check")] = True,
    on: Annotated[str, typer.Option(help="local or slurm")] = "local",
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="processes on each; 0: one a GPU, or 2 on CPUs")] = 0,
    partition: Annotated[str, typer.Option(help="Slurm partition")] = "",
    account: Annotated[str, typer.Option(help="Slurm account")] = "",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine; 0: CPUs")] = 0,
    exclude: Annotated[str, typer.Option(help="nodes that must not be used, with commas")] = "",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, or NAME; repeatable")] = None,
    time: Annotated[str, typer.Option(help="limit of the job")] = "10",
    wait_minutes: Annotated[float, typer.Option(help="how long to wait for the job")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="print the measurements as JSON")] = False,
) -> None:
    """Every device computes, every pair of ranks exchanges data: a matrix that shows the slow link and the odd device.

    Exit code 1 if something is wrong or far below its peers.
    """
    written, forwarded = parse_env(env or [], os.environ)
    folder = Path("runs", f"doctor-cluster-{clock.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    request = JobRequest(
        config="",
        task="probe",
        on=on,
        nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or 2,
        run_dir=str(folder),
        working_dir=os.getcwd(),
        name="distattn-doctor",
        python=sys.executable,
        time=time if on == "slurm" else "",
        partition=partition,
        account=account,
        gpus_per_node=gpus_per_node,
        exclude=tuple(filter(None, exclude.split(","))),
        env=written,
        forward=forwarded,
        max_restarts=0,
    )
    devices, links = _run(request, wait_minutes * 60)
    findings = judge(devices, links)
    if as_json:
        found = {"devices": devices, "links": links, "findings": findings}
        print(json.dumps({name: [asdict(entry) for entry in entries] for name, entries in found.items()}, indent=1))
    else:
        from rich.console import Console

        _print(devices, links, findings, Console(highlight=False))
    raise typer.Exit(1 if findings else 0)


def judge(devices: Sequence[Device], links: Sequence[Link]) -> list[Finding]:
    """What failed, and what is far slower than its peers: devices of one kind, links within a host or between hosts."""
    hosts = {device.rank: device.host for device in devices}
    findings = [
        Finding(f"rank {device.rank} on {device.host} ({device.device}): {device.error}", (device.host,))
        for device in devices
        if device.error
    ]
    for kind in dict.fromkeys(device.device for device in devices):
        peers = [device for device in devices if device.device == kind and not device.error]
        median = statistics.median(device.tflops for device in peers) if len(peers) >= _PEERS else 0.0
        findings += [
            Finding(
                f"rank {device.rank} on {device.host} computes {device.tflops:.3g} TFLOP/s, its peers {median:.3g}",
                (device.host,),
            )
            for device in peers
            if device.tflops < SLOW_DEVICE * median
        ]
    for within in (True, False):
        peers = [link for link in links if (hosts[link.source] == hosts[link.target]) == within]
        median = statistics.median(link.bytes_per_s for link in peers) if len(peers) >= _PEERS else 0.0
        for link in peers:
            between = (hosts[link.source], hosts[link.target])
            name = f"the link from rank {link.source} on {between[0]} to rank {link.target} on {between[1]}"
            if link.error:
                findings.append(Finding(f"{name}: {link.error}", between))
            elif link.bytes_per_s < SLOW_LINK * median:
                rates = f"{link.bytes_per_s / 1e9:.3g} GB/s, its peers {median / 1e9:.3g}"
                findings.append(Finding(f"{name} moves {rates}", between))
    return findings


def hosts_to_exclude(findings: Sequence[Finding], devices: Sequence[Device]) -> list[str]:
    """The fewest hosts that explain the findings, the most frequent first; none where that would be all."""
    left, chosen = list(findings), []
    while left:
        counts = Counter(host for finding in left for host in set(finding.hosts))
        worst = max(counts, key=lambda host: (counts[host], host))
        chosen.append(worst)
        left = [finding for finding in left if worst not in finding.hosts]
    return chosen if len(chosen) < len({device.host for device in devices}) else []


def _run(request: JobRequest, wait_s: float) -> tuple[list[Device], list[Link]]:
    if request.on not in ("local", "slurm"):
        raise ConfigError(f"--cluster runs on local or slurm, not on {request.on}: start it on the nodes of your cluster.")
    path = Path(request.run_dir) / RESULT
    if request.on == "local":
        find_target("local").check(request)
        code = launch_local(request.command(), request.ranks_per_node, log_dir=path.parent / "logs", env=request.env)
        reason = f"the check ended with exit code {code}"
    else:
        reason = _run_job(request, path, wait_s)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{reason}, and left no result: its logs are in {path.parent / 'logs'}.") from error
    return [Device(**entry) for entry in found["devices"]], [Link(**entry) for entry in found["links"]]


def _run_job(request: JobRequest, path: Path, wait_s: float) -> str:
    """Submit and wait for the result or the end of the job; how it ended."""
    target = find_target(request.on)
    target.check(request)
    (record,) = target.submit(request)
    print(f"{record.id} submitted: its logs are in {path.parent / 'logs'}", file=sys.stderr, flush=True)
    deadline = clock.monotonic() + wait_s
    state = target.state(record)
    try:
        while state.active and not path.exists() and clock.monotonic() < deadline:
            clock.sleep(_POLL_S)
            state = target.state(record)
    finally:
        # Also when the user stops waiting: nothing is left to run for nobody.
        if state.active and not path.exists():
            target.cancel(record, now=True)
    return f"{record.id} is {state.state} {f'({state.reason})' if state.reason else ''}".rstrip()


def _print(devices: Sequence[Device], links: Sequence[Link], findings: Sequence[Finding], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("rank", "host", "device", "TFLOP/s", *(f"→ {device.rank}" for device in devices)):
        table.add_column(title, justify="left" if title in ("host", "device") else "right")
    odd = {finding.text for finding in findings}
    by_pair = {(link.source, link.target): link for link in links}
    for device in devices:
        row = [str(device.rank), escape(device.host), escape(device.device), f"{device.tflops:.3g}"]
        for other in devices:
            link = by_pair.get((device.rank, other.rank))
            # A finding's sentence begins with the link's name.
            named = f"the link from rank {device.rank} on {device.host} to rank {other.rank} on {other.host}"
            slow = any(text.startswith((f"{named}:", f"{named} ")) for text in odd)
            cell = "–" if link is None else f"{link.bytes_per_s / 1e9:.2f}"
            row.append(f"[bold red]{cell}![/]" if slow else cell)
        table.add_row(*row)
    console.print("GB/s from each rank (row) to each (column):")
    console.print(table)
    for finding in findings:
        console.print(f"[red]{escape(finding.text)}[/]", soft_wrap=True)
    excluded = hosts_to_exclude(findings, devices)
    if excluded:
        console.print(
            f"without the nodes that this points to: distattn submit … --exclude {','.join(excluded)}", soft_wrap=True
        )
    elif not findings:
        round_trips = [link.round_trip_s for link in links] or [0.0]
        console.print(
            f"all {len(devices)} devices compute, all {len(links)} links work; the longest round trip is "
            f"{max(round_trips) * 1e6:,.0f} µs"
        )
