"""From a request to the batch script that Slurm gets: text from data, nothing asked and nothing run.

sbatch ARGUMENTS SCRIPT          arguments carry what users may spell freely: no shell and no directive parser reads them
  #SBATCH lines                  words and numbers
  srun, one for the job ──▶ bash -c 'export RANK=$SLURM_PROCID …; exec "$@"' ──▶ one process a rank, on every node
    │ ends ──▶ slurm_verdict: done │ failed: again here │ stopped with a checkpoint: requeue │ give up, with the reason
    └ TERM from `scancel --signal=TERM`, preemption, or this script before the time limit: ranks write a checkpoint, end with 0

Every value of the user's is one quoted word of the script, whatever is in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib import resources

from distattn.errors import ConfigError
from distattn.launchers.request import Element, JobRequest

__all__ = [
    "AGAIN",
    "FIRST_PORT",
    "NUM_PORTS",
    "REQUEUE",
    "default_template",
    "output_pattern",
    "render_script",
    "sbatch_arguments",
]

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Jobs meet at FIRST_PORT + job number mod NUM_PORTS: below the ports that systems hand out by themselves."""

AGAIN, REQUEUE = 10, 11
"""Exit codes by which the verdict asks the script to start the ranks again, here or through the queue."""

_ROLES = ("directives", "environment", "run")
_MARK = re.compile(r"#DISTATTN (\S+)[ \t]*")

_RANK = (
    "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$RANKS_PER_NODE\n"
    'exec "$@" >>"$LOGS/rank-$SLURM_PROCID.log" 2>&1'
)


def default_template() -> str:
    """The template that is used where a request names none."""
    return resources.files("distattn.launchers").joinpath("slurm_template.sbatch").read_text(encoding="utf-8")


def sbatch_arguments(request: JobRequest) -> list[str]:
    """Arguments of ``sbatch`` before the script's path; ``--parsable`` makes it print the job's number alone."""
    return [
        "sbatch",
        "--parsable",
        f"--job-name={request.name}",
        f"--chdir={request.working_dir}",
        f"--output={output_pattern(f'{request.run_dir}/logs/slurm.log')}",
    ]


def output_pattern(path: str) -> str:
    """A path as Slurm's --output wants it, so that none of it is taken for a pattern such as %j."""
    # A backslash anywhere turns patterns off, and then stands for itself if it is doubled.
    return path.replace("\\", "\\\\") if "\\" in path else path.replace("%", "%%")


def render_script(request: JobRequest, template: str | None = None) -> str:
    """The batch script of a request, in the given template or in ours.

    ConfigError: the template lacks ``#DISTATTN run``, repeats a mark, or has one that does not exist.
    """
    parts = {"directives": _directives(request), "environment": _environment(request), "run": _run(request)}
    lines: list[str] = []
    seen: set[str] = set()
    for line in (default_template() if template is None else template).splitlines():
        mark = _MARK.fullmatch(line)
        if mark is None:
            lines.append(line)
            continue
        role = mark[1]
        if role not in parts or role in seen:
            fault = "appears twice" if role in seen else "is unknown"
            raise ConfigError(f"#DISTATTN {role} in the template {fault}: the marks are {', '.join(_ROLES)}, each once.")
        seen.add(role)
        lines += parts[role]
    if "run" not in seen:
        raise ConfigError(f"the template {request.template} has no line '#DISTATTN run', where the ranks are to be started.")
    return "\n".join(lines) + "\n"


# --- parts ------------------------------------------------------------------------------------------------------------


def _directives(request: JobRequest) -> list[str]:
    options = {
        "nodes": request.nodes,
        "ntasks-per-node": request.ranks_per_node,
        "cpus-per-task": request.cpus_per_rank or "",
        "gpus-per-node": request.gpus_per_node or "",
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "exclude": ",".join(request.exclude),
        "array": f"0-{len(request.elements) - 1}" if request.array else "",
        # Nothing of the submitting shell's environment enters the job but what is named here.
        "export": ",".join(request.forward) or "NONE",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    if request.task != "train":
        return [*lines, "#SBATCH --no-requeue"]
    # To the script, which tells the ranks: a rank that has just started would die of it, and nobody would know why.
    return [*lines, "#SBATCH --requeue", f"#SBATCH --signal=B:USR1@{request.stop_seconds}"]


def _environment(request: JobRequest) -> list[str]:
    threads = "${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE > RANKS_PER_NODE ? SLURM_CPUS_ON_NODE / RANKS_PER_NODE : 1))}"
    port = str(request.port) if request.port else f"$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))"
    lines = [
        f"export RANKS_PER_NODE={request.ranks_per_node}",
        "# Ranks meet on the first node of the allocation, at a port that no other job of that node has.",
        'first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        """MASTER_ADDR=$(scontrol --oneliner show node "$first_node" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')""",
        f"MASTER_PORT={port}",
        "export MASTER_ADDR MASTER_PORT",
        "# Nodes that are one machine (slurm/devcluster) talk over its loopback interface and open nothing beyond it.",
        'case "$MASTER_ADDR" in 127.*) export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo ;; esac',
        "# Ranks share the cores of their node; more threads than cores slow each other down.",
        f"export OMP_NUM_THREADS={threads}",
        "# A file in the working directory must not take the place of an installed module.",
        "export PYTHONSAFEPATH=1",
        "# What a killed rank said last is in its log, and a crash in native code leaves a stack there.",
        "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
    ]
    if request.gpus_per_node:
        lines += [
            "# A link or device that fails is named in the log of its rank.",
            "export NCCL_DEBUG=WARN",
            "# When a collective hangs, every rank writes down which ones it has begun and ended.",
            "export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1",
            "# GPU LOCAL_RANK is the one that nvidia-smi calls so.",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
            "# Packed sequences differ in what they need; blocks that can grow keep memory from falling to pieces.",
            "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ]
    if request.env:
        lines.append("# Asked for with --env.")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in request.env.items()]
    return lines


def _run(request: JobRequest) -> list[str]:
    lines = [f"command=({_words(request.command())})", f"run_dir={shlex.quote(request.run_dir)}"]
    if request.array:
        lines += _choose_element(request.elements)
    lines += [
        'export LOGS="$run_dir/logs"',
        'mkdir -p "$LOGS"',
        'exec >>"$LOGS/slurm.log" 2>&1',
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        'echo "job $job on $SLURM_JOB_NODELIST, ranks meet at $MASTER_ADDR:$MASTER_PORT"',
        f"step=(srun {_words(_step_options(request))})",
        f"rank={shlex.quote(_RANK)}",
    ]
    inside = " ".join([*map(shlex.quote, _container_command(request)), "bash"])
    start = f'"${{step[@]}}" --kill-on-bad-exit=1 {inside} -c "$rank" rank "${{command[@]}}"'
    if request.task != "train":
        return [*lines, start]
    return [*lines, *_restart_loop(request, start)]


def _choose_element(elements: Sequence[Element]) -> list[str]:
    cases = [
        f"  {number}) command+=({_words(element.overrides)}) run_dir={shlex.quote(element.run_dir)} ;;"
        for number, element in enumerate(elements)
    ]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def _restart_loop(request: JobRequest, start: str) -> list[str]:
    verdict = ["timeout", "600", *_container_command(request), request.python, "-m", "distattn.launchers.slurm_verdict"]
    if request.container and not _is_image_file(request.container):
        verdict = ['"${step[@]}"', "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *verdict[2:]]
    # "${step[@]}" is code of ours; the rest are words.
    ask = " ".join(word if word.startswith('"${') else shlex.quote(word) for word in verdict)
    return [
        "# Slurm sends USR1 before the time limit; TERM asks the ranks for a checkpoint.",
        "ending=no",
        """trap 'ending=yes signalled=yes; scancel --signal=TERM "$job"' USR1""",
        "# A shell acts on a signal between commands, and so it has to wait for one that runs beside it.",
        "attend() {",
        '  "$@" &',
        "  local pid=$! status signalled=yes",
        '  while [ "$signalled" = yes ]; do',
        "    signalled=no",
        '    wait "$pid"',
        "    status=$?",
        "  done",
        '  return "$status"',
        "}",
        "while true; do",
        "  # Every start leaves a byte, so that starts are counted across requeues too.",
        '  printf . >>"$LOGS/slurm-$job.starts"',
        '  restart=$(($(wc -c <"$LOGS/slurm-$job.starts") - 1))',
        "  # Noted here for the ranks, which may die before they can: failures are counted by starts.",
        """  printf '{"event": "started", "time": %s, "restart": %s, "ranks": %s}\\n' \\""",
        '    "$(date +%s)" "$restart" $((SLURM_JOB_NUM_NODES * RANKS_PER_NODE)) >>"$run_dir/attempts.jsonl"',
        "  export DISTATTN_RESTART=noted",
        f"  attend {start}",
        "  status=$?",
        "  # A lost node answers no more, some minutes before Slurm gives it up: then the job needs another one.",
        "  answer=yes",
        '  if [ "$status" != 0 ]; then',
        '    timeout 60 srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true || answer=no',
        "  fi",
        f"  attend {ask} \\",
        f'    "$run_dir" "$job" "$status" {request.max_restarts} "$answer" "$ending"',
        "  verdict=$?",
        '  case "$verdict" in',
        f'    {AGAIN}) if [ "$ending" = yes ]; then scontrol requeue "$job"; exit; fi ;;',
        f'    {REQUEUE}) scontrol requeue "$job"; exit ;;',
        '    *) exit "$verdict" ;;',
        "  esac",
        "done",
    ]


def _step_options(request: JobRequest) -> list[str]:
    options = ["--export=ALL"]
    if request.cpus_per_rank:
        options.append(f"--cpus-per-task={request.cpus_per_rank}")
    if request.container and not _is_image_file(request.container):
        mounts = ",".join(dict.fromkeys(f"{path}:{path}" for path in (request.working_dir, request.run_dir)))
        options += [
            f"--container-image={request.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={request.working_dir}",
        ]
    return options


def _container_command(request: JobRequest) -> list[str]:
    """What starts a command inside an image file; images of a registry are the business of srun's own options."""
    if not _is_image_file(request.container):
        return []
    gpu = ["--nv"] if request.gpus_per_node else []
    mounts = f"{request.working_dir},{request.run_dir}"
    return ["apptainer", "exec", *gpu, "--bind", mounts, "--pwd", request.working_dir, request.container]


def _is_image_file(container: str) -> bool:
    return container.endswith(".sif")


def _words(values: Sequence[str]) -> str:
    return " ".join(shlex.quote(value) for value in values)
