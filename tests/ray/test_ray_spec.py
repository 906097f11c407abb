"""What Ray is given, as plain data; refusals. Ring 1: no Ray cluster."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.cli.main import main
from distattn.config import Config
from distattn.errors import ConfigError
from distattn.launchers.ray_spec import (
    PACKAGE,
    Orders,
    bundle,
    cancel_mark,
    choose_count,
    jobs_address,
    orders,
    preview,
    ray_job,
    submit_patiently,
)
from distattn.launchers.ray_target import RayTarget
from distattn.launchers.request import ArrayAxis, JobRequest
from distattn.training.preflight import node_counts

HOSTILE = "a b'c\"d;$(touch created)`touch created`\n\\ü 1e3 $HOME"


def request(**changes: object) -> JobRequest:
    base = JobRequest(
        config="configs/quickstart.yaml",
        overrides=("run.dir=/shared/runs/x",),
        on="ray",
        nodes=2,
        ranks_per_node=4,
        run_dir="/shared/runs/x",
        working_dir="/shared",
        python="python3",
    )
    return base.replace(**changes)


def test_values_arrive_as_they_are_and_execute_nothing(tmp_path: Path) -> None:
    asked = request(
        config=f"/x/{HOSTILE}.yaml", overrides=(f"data.text_key={HOSTILE}",), env={"COLOUR": HOSTILE}, name=HOSTILE,
        run_dir=f"/shared/{HOSTILE}", working_dir=f"/{HOSTILE}",
    )  # fmt: skip
    told = orders(asked, "ray-1")
    job = ray_job(asked.replace(python="printf"), told, "distattn-1")
    # Ray runs the entrypoint in a shell: printf instead of Python shows what a program would be given.
    words = shlex.split(job.entrypoint)
    shown = subprocess.run(
        f"printf '%s\\0' {' '.join(map(shlex.quote, words[1:]))}", shell=True, capture_output=True, cwd=tmp_path, check=True
    )
    assert shown.stdout.decode().split("\0")[:-1] == words[1:]
    by_shell = subprocess.run(
        ["sh", "-c", job.entrypoint.replace("printf", "printf '%s\\0'", 1)], capture_output=True, cwd=tmp_path
    )
    received = Orders.loads(by_shell.stdout.decode().split("\0")[-2])
    assert received == told
    assert received.command[-1] == f"data.text_key={HOSTILE}"
    assert received.env == {"COLOUR": HOSTILE}
    assert job.metadata["name"] == HOSTILE
    assert list(tmp_path.iterdir()) == []


def test_the_package_travels_and_not_what_lies_beside_it() -> None:
    asked = request()
    environment = ray_job(asked, orders(asked, "ray-1"), "x").runtime_env
    assert environment["py_modules"] == [PACKAGE]
    assert Path(PACKAGE).name == "distattn"
    assert "working_dir" not in environment
    assert environment["env_vars"] == {"PYTHONSAFEPATH": "1"}


def test_a_bundle_holds_a_nodes_ranks() -> None:
    assert bundle(request()) == {"CPU": 4.0}
    assert bundle(request(cpus_per_rank=8)) == {"CPU": 32.0}
    assert bundle(request(gpus_per_node=8, ranks_per_node=8)) == {"CPU": 8.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("counts", "nodes", "expected"),
    [
        ((4, 2, 1), [{"CPU": 4.0}] * 4, 4),
        ((4, 2, 1), [{"CPU": 4.0}] * 3, 2),
        ((4, 2, 1), [{"CPU": 8.0}, {"CPU": 11.0}], 4),
        ((4, 2, 1), [{"CPU": 3.0}], 0),
        ((4,), [{"CPU": 4.0}] * 3, 0),
        ((2, 1), [], 0),
    ],
)
def test_how_many_nodes_an_attempt_gets(counts: tuple[int, ...], nodes: list[dict[str, float]], expected: int) -> None:
    assert choose_count(orders(request(node_counts=counts), "ray-1"), nodes) == expected


def test_gpus_count_as_well() -> None:
    nodes = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0}, {"CPU": 64.0, "GPU": 4.0}]
    told = orders(request(node_counts=(2, 1), gpus_per_node=8, ranks_per_node=8), "ray-1")
    assert choose_count(told, nodes) == 1


SERVERS = {"server_resources": {"attention_server": 1.0, "CPU": 2.0}, "server_nodes": 1, "context_nodes": 3}


def test_attention_servers_have_bundles_of_their_own() -> None:
    """Of every three nodes the last, which is where the last ranks of a context group are."""
    told = orders(request(nodes=6, node_counts=(6, 3), **SERVERS), "ray-1")
    assert [node for node in range(6) if told.is_server(node)] == [2, 5]
    server = {"attention_server": 1.0, "CPU": 2.0}
    assert told.bundles(6) == [{"CPU": 4.0}, {"CPU": 4.0}, server] * 2
    assert Orders.loads(told.dumps()) == told
    assert not any(map(orders(request(nodes=6), "ray-1").is_server, range(6))), "without the option servers are as the others"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 4.0}] * 4 + [{"CPU": 2.0, "attention_server": 1.0}] * 2, 6),
        ([{"CPU": 4.0}] * 4 + [{"CPU": 2.0, "attention_server": 1.0}], 3),
        ([{"CPU": 4.0}] * 6, 0),
        ([{"CPU": 2.0, "attention_server": 1.0}] * 6, 0),
        # What servers alone can take must not go to others, however the nodes are listed.
        ([{"CPU": 6.0, "attention_server": 1.0}, {"CPU": 4.0}, {"CPU": 4.0}], 3),
        ([{"CPU": 10.0, "attention_server": 2.0}, {"CPU": 10.0}, {"CPU": 2.0, "attention_server": 1.0}], 6),
    ],
)
def test_room_for_both_kinds(nodes: list[dict[str, float]], expected: int) -> None:
    assert choose_count(orders(request(nodes=6, node_counts=(6, 3), **SERVERS), "ray-1"), nodes) == expected


def test_the_preview_counts_bundles_by_kind() -> None:
    text = preview(request(nodes=3, **SERVERS))
    assert '# 2 nodes, each a bundle of {"CPU": 4.0}, spread' in text
    assert '# 1 nodes, each a bundle of {"attention_server": 1.0, "CPU": 2.0}, spread' in text


def test_servers_as_a_user_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--server-resource`` with --dry-run: the driver's orders, and what is refused."""
    (tmp_path / "tiny.yaml").write_text(
        "model: {num_heads: 4, num_kv_heads: 2}\nparallel: {context: 4, strategy: disaggregated, servers: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = ["--on", "ray", "--nodes", "2", "--ranks-per-node", "2", "--server-resource", "server=0.5"]

    def run(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["distattn", "submit", "tiny.yaml", *asked, "--dry-run", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr()
        return caught.value.code or 0, shown.out + shown.err

    code, shown = run()
    assert code == 0, shown
    told = Orders.loads(shlex.split(json.loads(shown[shown.index("\n{") :])["entrypoint"])[-1])
    assert (told.bundles(2), told.counts) == ([{"CPU": 2.0}, {"server": 0.5}], (2,))
    for words, message in (
        (["parallel.servers=0"], "--server-resource is for attention servers, and parallel.servers=0 has none"),
        (["parallel.servers=1"], "parallel.servers=1 of parallel.context=4 ranks do not fill nodes of 2: make both multiples"),
        (["--server-resource", "x"], "--server-resource 'x' is not NAME=AMOUNT: write for instance attention_server=1."),
        (["--server-resource", "x=0"], "--server-resource x=0 is not a resource"),
        (["--server-resource", "a b=1"], "--server-resource a b=1 is not a resource"),
        (["--gpus-per-node", "2"], "gives the nodes of attention servers 0 GPUs for 2 ranks, which need one each"),
        (["--on", "slurm"], "--server-resource has no meaning with --on slurm"),
    ):
        code, shown = run(*words)
        assert (code, message in shown) == (2, True), (words, shown)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"parallel.context": 4, "parallel.data": 0, "train.global_batch": 8}, (4, 2)),
        ({"parallel.context": 2, "parallel.data": 0, "train.global_batch": 6}, (3, 2, 1)),
        ({"parallel.context": 2, "parallel.data": 4, "train.global_batch": 8}, (4,)),
        ({"parallel.context": 16, "parallel.data": 0, "train.global_batch": 8}, ()),
    ],
)
def test_fewer_nodes_that_compute_the_same_steps(keys: dict[str, int], expected: tuple[int, ...]) -> None:
    config = Config()
    for key, value in keys.items():
        config = config.replace(key, value)
    assert node_counts(config, 4, 2) == expected


@pytest.mark.parametrize("address", ["", "head:8265", "ray://head:10001", "127.0.0.1:6379"])
def test_an_address_of_another_kind(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a Ray dashboard: write for instance http://head-node:8265"):
        jobs_address(address)
    assert jobs_address("http://head:8265/") == "http://head:8265"


GOLDEN_ORDERS = (
    '{"job": "ray-JOB", "command": ["-m", "distattn.cli.main", "train", "--", "configs/quickstart.yaml", '
    '"run.dir=/shared/runs/x", "optim.lr=1e-3", "run.dir=/shared/runs/x/optim.lr=1e-3"], '
    '"run_dir": "/shared/runs/x/optim.lr=1e-3", "working_dir": "/shared", "counts": [2, 1], "ranks_per_node": 4, '
    '"bundle": {"CPU": 4.0}, "env": {"COLOUR": "it\'"\'"\'s"}, "max_restarts": 3, "port": 29500, '
    '"server_bundle": {}, "server_nodes": 0, "context_nodes": 0}'
)
GOLDEN = f"""\
# ports:
#   TCP 29500 on the first node, every interface: where ranks meet
#   TCP, a free port a rank: data between ranks (gloo; NCCL where there are GPUs)
#   none of Ray's own: the cluster at http://head:8265 is there already
# 2 nodes, each a bundle of {{"CPU": 4.0}}, spread over the cluster
# job to http://head:8265:
{{
 "submission_id": "distattn-JOB",
 "entrypoint": {json.dumps(f"python3 -P -m distattn.launchers.ray_driver '{GOLDEN_ORDERS}'")},
 "metadata": {{
  "name": "distattn optim.lr=1e-3",
  "run_dir": "/shared/runs/x/optim.lr=1e-3"
 }},
 "runtime_env": {{
  "py_modules": [
   {json.dumps(PACKAGE)}
  ],
  "env_vars": {{
   "PYTHONSAFEPATH": "1"
  }},
  "excludes": [
   "**/__pycache__"
  ]
 }}
}}
"""


def test_the_preview_is_the_whole_truth() -> None:
    asked = request(
        ray_address="http://head:8265", port=29500, node_counts=(2, 1), env={"COLOUR": "it's"},
        array=(ArrayAxis("optim.lr", ("1e-3",)),),
    )  # fmt: skip
    (job,) = asked.jobs
    assert preview(job) == GOLDEN


def test_a_cluster_of_ones_own_opens_nothing_to_others() -> None:
    text = preview(request())
    ports = [line for line in text.splitlines() if line.startswith("#   TCP")]
    assert len(ports) == 2
    assert all("on 127.0.0.1" in line for line in ports)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "gpu"}, "--partition has no meaning with --on ray"),
        ({"time": "1:00:00"}, "--time has no meaning with --on ray"),
        ({"container": "x.sif"}, "--container has no meaning with --on ray"),
        ({"gpus_per_node": 8, "nodes": 40}, r"needs 320 GPUs, and this machine has \d+: lower them, or name a cluster"),
        ({"ray_address": "http://h:1", "forward": ("API_KEY",)}, "--env API_KEY cannot be passed on unwritten: Ray keeps"),
        ({"ray_address": "ray://h:10001"}, "is not the address of a Ray dashboard"),
    ],
)
def test_refusals_are_a_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayTarget().check(request(**changes))


def test_a_cluster_that_is_not_ready_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["No available agent to submit job, please try again later", ""])
    monkeypatch.setattr("distattn.launchers.ray_spec.time.sleep", lambda seconds: None)

    def submit(**job: str) -> str:
        if refusal := next(answers):
            raise RuntimeError(refusal)
        return job["submission_id"]

    assert submit_patiently(submit, {"submission_id": "x"}) == "x"
    answers = iter(["this entrypoint is not allowed"])
    with pytest.raises(RuntimeError, match="not allowed"):
        submit_patiently(submit, {"submission_id": "x"})


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at http://127.0.0.1:{port}: check --ray-address"):
        RayTarget().check(request(ray_address=f"http://127.0.0.1:{port}"))


def test_an_attempt_takes_fewer_nodes_when_all_do_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them where they are there; else, after a while, as many as the run can use; none once a user has cancelled."""
    from distattn.launchers import ray_driver

    told = orders(request(nodes=4, node_counts=(4, 2, 1), run_dir=str(tmp_path)), "ray-1")
    here = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 3 + [{"Alive": False, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ray_driver.ray, "nodes", lambda: here)
    monkeypatch.setattr(ray_driver, "_POLL_S", 0.01)
    said: list[str] = []
    assert ray_driver.wait_for_nodes(told, said.append, timeout_s=0.2) == 2
    assert said == ["waiting for 4 nodes with {'CPU': 4.0}; there is room for 2"]
    here.append({"Alive": True, "Resources": {"CPU": 4.0}})
    assert ray_driver.wait_for_nodes(told, said.append) == 4
    mark = cancel_mark(told.run_dir, told.job)
    mark.parent.mkdir()
    mark.touch()
    assert ray_driver.wait_for_nodes(told, said.append) == 0
