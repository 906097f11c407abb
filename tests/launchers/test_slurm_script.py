"""Plan only: the batch script as text (golden files, compared whole), and what bash makes of hostile values in it.

Where a golden file differs on purpose, copy the file that the failing test names over it and read the difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.cli.main import main
from distattn.errors import ConfigError
from distattn.launchers.request import ArrayAxis, JobRequest
from distattn.launchers.slurm import SlurmTarget
from distattn.launchers.slurm_script import default_template, output_pattern, render_script, sbatch_arguments

GOLDEN = Path(__file__).with_name("golden")
ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a b'\"\\;$(touch pwned)`touch pwned`\n#SBATCH --nodes=9\n&& touch pwned #é☃%j*~$HOME"

CASES = {
    "local": ["--on", "local", "--ranks-per-node", "2", "--env", "OMP_NUM_THREADS=1"],
    "slurm": ["--on", "slurm", "--nodes", "2", "--ranks-per-node", "1"],
    "slurm-gpus": [
        *("--on", "slurm", "--nodes", "2", "--ranks-per-node", "8", "--gpus-per-node", "8", "--cpus-per-rank", "12"),
        *("--time", "4:00:00", "--stop-seconds", "300", "--partition", "h100", "--account", "lab", "--exclude", "n7,n9"),
        *("--env", "NCCL_IB_HCA=mlx5", "--env", "WANDB_API_KEY", "--name", "a million tokens", "--max-restarts", "5"),
        *("parallel.context=16", "--port", "29500"),
    ],
    "slurm-array": [
        *("--on", "slurm", "--nodes", "2", "--ranks-per-node", "1"),
        *("--array", "parallel.strategy=ring,all_gather", "train.steps=5"),
    ],
    "slurm-array-nodes": [
        *("--on", "slurm", "--ranks-per-node", "2", "--array", "nodes=1,2", "--array", "parallel.context=2,4"),
        "parallel.data=0",
    ],
    "slurm-container": [
        *("--on", "slurm", "--nodes", "2", "--ranks-per-node", "1", "--gpus-per-node", "1"),
        *("--container", "nvcr.io/nvidia/pytorch:26.01-py3"),
    ],
    "slurm-image-file": [
        *("--on", "slurm", "--nodes", "2", "--ranks-per-node", "1", "--gpus-per-node", "1"),
        *("--container", "/images/distattn 1.sif"),
    ],
    "slurm-template": ["--on", "slurm", "--nodes", "2", "--ranks-per-node", "1", "--template", "own.sbatch"],
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What --dry-run prints, whole; only the folder of this test is replaced. It needs no Slurm, and writes nothing."""
    (tmp_path / "tiny.yaml").write_text("model: {num_heads: 4, num_kv_heads: 2}\nparallel: {context: 2, strategy: ring}\n")
    (tmp_path / "own.sbatch").write_text(
        "#!/bin/bash\n#DISTATTN directives\n#SBATCH --reservation=ours\nmodule load cuda\n"
        "#DISTATTN environment\n#DISTATTN run\n"
    )
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-the-user")
    interpreter = [] if "--container" in CASES[name] else ["--python", "/opt/venv/bin/python"]
    monkeypatch.setattr(sys, "argv", ["distattn", "submit", "tiny.yaml", *CASES[name], *interpreter, "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr()
    assert not caught.value.code, shown.err
    assert "a-secret-of-the-user" not in shown.out
    text = shown.out.replace(str(tmp_path), "/home/user/project")
    actual = tmp_path / f"{name}.txt"
    actual.write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text(), f"{actual} differs from the golden file"
    actual.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_templates_are_bash() -> None:
    """Ours, and those that users may begin with, in every form that a request gives them."""
    templates = {path.name: path.read_text() for path in sorted((ROOT / "slurm").glob("*.sbatch"))}
    assert templates["default.sbatch"] == default_template()
    assert len(templates) > 1
    for name, template in templates.items():
        for request in (
            JobRequest("a.yaml", on="slurm", run_dir="/r", working_dir="/w", gpus_per_node=1),
            JobRequest("a.yaml", on="slurm", run_dir="/r", working_dir="/w", array=(ArrayAxis("kernel", ("a", "b")),)),
            JobRequest("", on="slurm", run_dir="/r", working_dir="/w", task="probe", container="x.sif"),
        ):
            script = render_script(request, template)
            done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), name
            assert "#DISTATTN" not in re.sub(r"^# .*$", "", script, flags=re.MULTILINE)
            # sbatch stops reading directives at the first command.
            head = script[: script.index("\nexport")]
            assert "#SBATCH --nodes=1" in head


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("#!/bin/bash\n", "has no line '#DISTATTN run'"),
        ("#DISTATTN run\n#DISTATTN run\n", "#DISTATTN run in the template appears twice"),
        ("#DISTATTN rnu\n", "#DISTATTN rnu in the template is unknown: the marks are directives, environment, run"),
    ],
)
def test_templates_that_cannot_work(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_script(JobRequest("a.yaml", on="slurm"), template)


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--template /no/such cannot be read: No such file"):
        SlurmTarget().preview(JobRequest("a.yaml", on="slurm", template="/no/such"))


def test_patterns_are_no_patterns() -> None:
    assert output_pattern("/a/100%j/b") == "/a/100%%j/b"
    assert output_pattern("/a\\b/%j") == "/a\\\\b/%j"


# --- hostile values, in a real bash ----------------------------------------------------------------------------------

RECORD = """#!{python}
import json, os, sys
kind = "verdict" if "distattn.launchers.slurm_verdict" in sys.argv else "rank"
with open(os.environ["RECORDS"] + "/" + kind + "-" + os.environ.get("RANK", "x"), "w") as out:
    json.dump({{"argv": sys.argv[1:], "value": os.environ.get("VALUE"), "cwd": os.getcwd()}}, out)
"""
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >"$RECORDS/srun-options"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && printf 'n1\\nn2\\n'
[ "$1 $2" = "--oneliner show" ] && echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1"
"""


@pytest.mark.parametrize("array", [(), (ArrayAxis("data.text_key", ("1e3", HOSTILE.replace("/", ""))),)], ids=["job", "array"])
def test_values_arrive_and_execute_nothing(tmp_path: Path, array: tuple[ArrayAxis, ...]) -> None:
    """Every value of the user's, through the script and bash, to the arguments and the environment of a rank."""
    tools, work, records = tmp_path / "tools", tmp_path / f"w {HOSTILE.replace('/', '')}", tmp_path / "records"
    for folder in (tools, work, records):
        folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), (HOSTILE, RECORD.format(python=sys.executable))):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    request = JobRequest(
        config=HOSTILE,
        overrides=(f"data.text_key={HOSTILE}", "1e3", ""),
        on="slurm",
        nodes=2,
        run_dir=f"{work}/run",
        working_dir=str(work),
        name=HOSTILE,
        python=str(tools / HOSTILE),
        env={"VALUE": HOSTILE},
        array=array,
    )
    env = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": "/nowhere",
        "RECORDS": str(records),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "20012",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        **({"SLURM_ARRAY_JOB_ID": "20011", "SLURM_ARRAY_TASK_ID": "1"} if array else {}),
    }
    script = render_script(request)
    done = subprocess.run(["bash"], input=script, cwd=work, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    element = request.elements[-1]
    rank = json.loads((records / "rank-1").read_text())
    assert rank == {
        "argv": ["-m", "distattn.cli.main", "train", "--", HOSTILE, *request.overrides, *element.overrides],
        "value": HOSTILE,
        "cwd": str(work),
    }
    verdict = json.loads((records / "verdict-x").read_text())
    job = "20011_1" if array else "20012"
    assert verdict["argv"] == ["-m", "distattn.launchers.slurm_verdict", element.run_dir, job, "0", "3", "yes", "no"]
    assert f"job {job} on n[1-2], ranks meet at 10.0.0.7:20012\n" in Path(element.run_dir, "logs", "slurm.log").read_text()
    assert [path for path in tmp_path.rglob("*") if path.name == "pwned"] == []
    # On sbatch's command line they are whole arguments, which no shell and no directive parser reads.
    assert f"--job-name={HOSTILE}" in sbatch_arguments(request)
    assert HOSTILE not in "\n".join(line for line in script.splitlines() if line.startswith("#SBATCH"))
    assert not (Path(os.getcwd()) / "pwned").exists()


def test_a_container_is_a_word_of_srun(tmp_path: Path) -> None:
    request = JobRequest("a.yaml", on="slurm", container=f"img {HOSTILE}", run_dir="/r", working_dir="/w w")
    script = render_script(request)
    line = script[script.index("step=(") : script.index("\nrank=")]
    shown = subprocess.run(
        ["bash", "-c", f"{line}\nprintf '%s\\0' \"${{step[@]}}\""], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split("\0")[:-1] == [
        *("srun", "--export=ALL", f"--container-image=img {HOSTILE}", "--container-mounts=/w w:/w w,/r:/r"),
        "--container-workdir=/w w",
    ]
    assert list(tmp_path.iterdir()) == []
