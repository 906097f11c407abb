"""``distattn submit``: check a run as the trainer would, then hand it to this machine, to Slurm or to Ray.

command line ──▶ the trainer's own checks ──▶ JobRequest ──▶ target: check ──▶ preview (--dry-run) or submit ──▶ registry
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from distattn.config import MAY_CHANGE, Config, load_config
from distattn.data import open_cache
from distattn.errors import ConfigError
from distattn.launchers.jobs import JobRegistry
from distattn.launchers.request import NODES, TARGETS, ArrayAxis, JobRequest, parse_env, parse_resources
from distattn.launchers.targets import find_target
from distattn.models.hf_weights import check_weights
from distattn.training.preflight import (
    Ranks,
    check_heads,
    check_kernel,
    check_resumed_data,
    check_space,
    check_vocabulary,
    choose_ranks,
    node_counts,
)
from distattn.training.run_dir import RunDir

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for instance configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys to set")] = None,
    on: Annotated[str, typer.Option(help=f"where: {', '.join(TARGETS)}")] = "local",
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="processes on each; 0: as the config and --gpus-per-node say")] = 0,
    name: Annotated[str, typer.Option(help="what the job is called; the config's name by default")] = "",
    time: Annotated[str, typer.Option(help="limit: minutes, H:M:S or D-H:M:S; the run goes on in a new job after it")] = "",
    stop_seconds: Annotated[int, typer.Option(help="so long before the limit ranks write a checkpoint")] = 120,
    partition: Annotated[str, typer.Option(help="Slurm partition")] = "",
    account: Annotated[str, typer.Option(help="Slurm account")] = "",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine; 0: CPUs")] = 0,
    cpus_per_rank: Annotated[int, typer.Option(help="CPUs of each rank; 0: what the cluster gives")] = 0,
    exclude: Annotated[str, typer.Option(help="nodes that must not be used, with commas")] = "",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, or NAME to pass a value on unwritten; repeatable")] = None,
    container: Annotated[str, typer.Option(help="image, or .sif file, that ranks run in")] = "",
    array: Annotated[
        list[str] | None, typer.Option(help="KEY=V1,V2,… or nodes=N1,N2,…: one run for each value; repeatable, in step")
    ] = None,
    template: Annotated[str, typer.Option(help="batch script template of your own")] = "",
    max_restarts: Annotated[int, typer.Option(help="restarts after failures")] = 3,
    port: Annotated[int, typer.Option(help="where ranks meet; 0: from the job's number")] = 0,
    ray_address: Annotated[str, typer.Option(help="Ray cluster; empty: a local one")] = "",
    server_resource: Annotated[
        list[str] | None, typer.Option(help="NAME=AMOUNT of a node of attention servers, on Ray; repeatable")
    ] = None,
    python: Annotated[str, typer.Option(help="interpreter of the ranks; this one by default, python3 in a container")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print exactly what would be submitted")] = False,
) -> None:
    """Start or resume a run in the background, on this machine or a cluster; then: distattn jobs, logs, cancel."""
    checked = load_config(config, overrides or [])
    written, forwarded = parse_env(env or [], os.environ)
    axes = tuple(ArrayAxis.parse(text) for text in array or ())
    most_nodes = max([nodes, *(int(value) for axis in axes if axis.key == NODES for value in axis.values)])
    ranks = ranks_per_node or _default_ranks(checked, most_nodes, gpus_per_node)
    values = tuple(overrides or ())
    if on == "local" and not checked.parallel.data and ranks % checked.parallel.context == 0:
        # `distattn train` starts as many ranks as the config says.
        values += (f"parallel.data={ranks // checked.parallel.context}",)
    request = JobRequest(
        config=str(config),
        overrides=values,
        on=on,
        nodes=nodes,
        ranks_per_node=ranks,
        run_dir=os.path.abspath(checked.run.dir),
        working_dir=os.getcwd(),
        name=name or config.stem,
        python=python or ("python3" if container else sys.executable),
        time=time,
        stop_seconds=stop_seconds,
        partition=partition,
        account=account,
        gpus_per_node=gpus_per_node,
        cpus_per_rank=cpus_per_rank,
        exclude=tuple(filter(None, exclude.split(","))),
        env=written,
        forward=forwarded,
        container=container,
        array=axes,
        template=template,
        max_restarts=max_restarts,
        port=port,
        ray_address=ray_address,
        server_resources=parse_resources(server_resource or []),
    )
    send(request, dry_run=dry_run)


def send(request: JobRequest, *, dry_run: bool) -> None:
    """Check and submit, or print what would be submitted."""
    target = find_target(request.on)
    runs = [(run, load_config(run.config, run.overrides)) for run in request.runs]
    for run, config in runs:
        _check_without_data(config, run)
    told = {run.run_dir: _tell(config, run) for run, config in runs}
    jobs = [told.get(job.run_dir, job) for job in request.jobs]
    if dry_run:
        print("\n".join(target.preview(job) for job in jobs), end="")
        return
    _require_free(request)
    for job in jobs:
        target.check(job)
    for run, config in runs:
        _prepare(config, run)
    registry = JobRegistry()
    for job in jobs:
        for record in target.submit(job):
            registry.add(record)
            print(f"{record.id} submitted: {record.run_dir}", flush=True)
    print("`distattn jobs` shows it, `distattn logs` what it prints, `distattn cancel` ends it.")


def _tell(config: Config, run: JobRequest) -> JobRequest:
    """A run's request with what its configuration says of nodes: how few will do, and which are of attention servers."""
    run = run.replace(node_counts=node_counts(config, run.nodes, run.ranks_per_node))
    if not run.server_resources:
        return run
    servers, context, each = config.parallel.servers, config.parallel.context, run.ranks_per_node
    if not servers:
        raise ConfigError(
            "--server-resource is for attention servers, and parallel.servers=0 has none: set parallel.servers, or leave the "
            "option out."
        )
    if servers % each or context % each:
        raise ConfigError(
            f"--server-resource gives attention servers nodes of their own, but parallel.servers={servers} of "
            f"parallel.context={context} ranks do not fill nodes of {each}: make both multiples of --ranks-per-node."
        )
    return run.replace(server_nodes=servers // each, context_nodes=context // each)


def _default_ranks(config: Config, nodes: int, gpus_per_node: int) -> int:
    wanted = config.parallel.context * max(config.parallel.data, 1)
    return gpus_per_node or max(1, -(-wanted // max(nodes, 1)))


def _check_without_data(config: Config, request: JobRequest) -> None:
    """What the trainer refuses and can be known before the data is read."""
    ranks = _ranks(config, request)
    check_heads(config, ranks)
    check_weights(config.model)
    if not request.gpus_per_node and ranks.device_type == "cpu":
        check_kernel(config, ranks)  # for GPUs, only a machine that has them can tell


def _ranks(config: Config, request: JobRequest) -> Ranks:
    if request.gpus_per_node:
        # The GPUs are the cluster's: whether this machine has one says nothing.
        return choose_ranks(config.replace("train.device", "cpu"), world=request.num_ranks)._replace(device_type="cuda")
    if request.on != "local" and config.train.device == "cuda":
        raise ConfigError("train.device=cuda needs GPUs: ask for them with --gpus-per-node, or set train.device=cpu.")
    if request.on == "local":
        ranks = choose_ranks(config)
        if ranks.data * ranks.context != request.num_ranks:
            raise ConfigError(
                f"parallel.context={ranks.context} × parallel.data={ranks.data} makes {ranks.data * ranks.context} ranks, but "
                f"--ranks-per-node is {request.ranks_per_node}: make them equal, or set parallel.data=0."
            )
        return ranks
    return choose_ranks(config.replace("train.device", "cpu"), world=request.num_ranks)


def _require_free(request: JobRequest) -> None:
    """No job that is still active has one of these run directories."""
    wanted = {element.run_dir for element in request.elements}
    for record in JobRegistry():
        if record.run_dir in wanted and find_target(record.target).state(record).active:
            raise ConfigError(
                f"run.dir={record.run_dir} is in use by job {record.id}: wait for it, `distattn cancel {record.id}`, or set "
                "another run.dir."
            )


def _prepare(config: Config, request: JobRequest) -> None:
    """The trainer's own checks of data and run directory; tokens are made here, once, before anything expensive is held."""
    ranks = _ranks(config, request)
    run = RunDir(request.run_dir)
    cache = open_cache(config.data, log=_say)
    check_vocabulary(config, cache)
    check_space(config, run)
    run.create()
    with run.lock():
        check_resumed_data(config, cache, run)
        run.claim_config(config.replace("parallel.data", ranks.data).to_dict(), MAY_CHANGE)
    step = run.finished()
    if step is not None:
        raise ConfigError(f"the run in {run.path} is finished: all {step} steps are done; set another run.dir to train anew.")


def _say(text: str) -> None:
    print(text, flush=True)
