"""Plan only: what a request refuses, and in which words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distattn.errors import ConfigError
from distattn.launchers.request import ArrayAxis, JobRequest, is_secret, parse_env
from distattn.launchers.targets import find_target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on": "cloud"}, "--on 'cloud' is unknown: choose one of local, slurm, ray"),
        ({"nodes": 0}, "--nodes is 0: it must be a whole number, 1 or more"),
        ({"ranks_per_node": -1}, "--ranks-per-node is -1"),
        (
            {"ranks_per_node": 9, "gpus_per_node": 8},
            "--ranks-per-node is 9 and --gpus-per-node is 8: a rank needs a GPU of its own",
        ),
        ({"time": "two hours"}, "--time is 'two hours': write minutes, H:M:S or D-H:M:S"),
        ({"partition": "gpu; rm -rf /"}, "--partition is 'gpu; rm -rf /': it may hold letters"),
        ({"account": "$(id)"}, "--account is '$(id)'"),
        ({"exclude": ("n1", "-x")}, "--exclude is '-x'"),
        ({"exclude": ("n1\n#SBATCH --uid=0",)}, "--exclude is 'n1\\n#SBATCH --uid=0'"),
        ({"run_dir": "runs/a"}, "run.dir of a job is 'runs/a': it must be an absolute path"),
        ({"name": ""}, "--name is empty"),
        ({"overrides": ("a=\0",)}, "holds a NUL character"),
        ({"env": {"A B": "1"}}, "--env 'A B' is not the name of an environment variable"),
        ({"forward": ("x;y",)}, "--env 'x;y' is not the name"),
        ({"env": {"SLURM_CONF": "x"}}, "--env SLURM_CONF is refused"),
        ({"env": {"HF_TOKEN": "x"}}, "--env HF_TOKEN=… is refused: the name says that it is a secret"),
        ({"port": 80}, "--port is 80: it must be between 1024 and 65535"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        JobRequest(config="a.yaml", **changes)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("time", ["30", "90:00", "2:30:00", "1-12", "7-00:00:00"])
def test_times(time: str) -> None:
    assert JobRequest(config="a.yaml", time=time).time == time


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "WANDB_API_KEY", "MY_CREDENTIALS"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEYS"])
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_env_options() -> None:
    present = {"HF_TOKEN": "hidden"}
    assert parse_env(["A=1=2", "B=", "HF_TOKEN"], present) == ({"A": "1=2", "B": ""}, ("HF_TOKEN",))
    with pytest.raises(ConfigError, match="--env C names a variable that is not set here"):
        parse_env(["C"], present)


def test_an_array_is_a_run_for_each_value() -> None:
    request = JobRequest(config="a.yaml", run_dir="/r", array=(ArrayAxis.parse("data.seq_len=1e3,64"),))
    assert [(e.overrides, e.run_dir) for e in request.elements] == [
        (("data.seq_len=1e3", "run.dir=/r/data.seq_len=1e3"), "/r/data.seq_len=1e3"),
        (("data.seq_len=64", "run.dir=/r/data.seq_len=64"), "/r/data.seq_len=64"),
    ]
    assert [run.array for run in request.runs] == [(), ()]


def test_an_array_of_numbers_of_nodes_with_an_axis_in_step() -> None:
    axes = (ArrayAxis.parse("nodes=1,4"), ArrayAxis.parse("parallel.context=8,32"))
    request = JobRequest(config="a.yaml", overrides=("a=b",), name="x", run_dir="/r", ranks_per_node=8, array=axes)
    small, large = request.runs
    assert (small.nodes, small.num_ranks, large.nodes, large.num_ranks) == (1, 8, 4, 32)
    assert (large.run_dir, large.name) == ("/r/nodes=4,parallel.context=32", "x nodes=4,parallel.context=32")
    assert large.overrides == ("a=b", "parallel.context=32", "run.dir=/r/nodes=4,parallel.context=32")
    assert large.elements[0].run_dir == large.run_dir


@pytest.mark.parametrize(
    ("on", "array", "jobs"),
    [
        ("slurm", ("kernel=a,b",), 1),  # a job array
        ("slurm", ("kernel=a,b", "nodes=1,2"), 2),  # whose elements cannot differ in their nodes
        ("ray", ("kernel=a,b",), 2),
        ("local", ("kernel=a,b",), 1),  # and refused
        ("slurm", (), 1),
    ],
)
def test_what_is_submitted_at_one_time(on: str, array: tuple[str, ...], jobs: int) -> None:
    request = JobRequest(config="a.yaml", on=on, run_dir="/r", array=tuple(map(ArrayAxis.parse, array)))
    assert len(request.jobs) == jobs
    assert {run.run_dir for run in request.runs} == {run.run_dir for job in request.jobs for run in job.runs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"array": ("kernel=a,b", "optim.lr=1,2,3")},
            "each needs another key and as many values: kernel has 2, optim.lr has 3",
        ),
        ({"array": ("kernel=a,b", "kernel=c,d")}, "each needs another key"),
        ({"array": ("nodes=1,2",), "nodes": 2}, "--nodes is 2, and --array nodes=… gives each run its own number of nodes"),
    ],
)
def test_arrays_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    axes = tuple(map(ArrayAxis.parse, changes.pop("array")))
    with pytest.raises(ConfigError, match=re.escape(message)):
        JobRequest(config="a.yaml", array=axes, **changes)


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=1,1", "a=1,,2", "a=../x,2", "run.dir=a,b", "nodes=0,1", "nodes=2,x"])
def test_arrays_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--array"):
        ArrayAxis.parse(text)


def test_unknown_target() -> None:
    with pytest.raises(ConfigError, match="--on 'cloud' is unknown: choose one of local, slurm, ray"):
        find_target("cloud")
