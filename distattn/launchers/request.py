"""What a user asks of a cluster, checked, and what every target can do with it.

command line ──▶ JobRequest ──check──▶ Target.preview(request)   exactly what would be submitted, as text
                                └────▶ Target.submit(request) ──▶ JobRecord in the registry ──▶ state, cancel, logs

A request is plain data. Values are kept as the user typed them; whoever builds a script or a command from them quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from distattn.errors import ConfigError

TARGETS = ("local", "slurm", "ray")
TASKS = ("train", "probe")
STATES = ("pending", "running", "finished", "stopped", "cancelled", "failed", "lost", "unknown")
"""pending: waits for resources. stopped: ended before its last step, and nothing will restart it. lost: no trace of it is left.
unknown: its target does not answer."""

ACTIVE_STATES = ("pending", "running")

NODES = "nodes"
"""The one key of an array that is no key of the configuration."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_WORD = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.,\[\]-]*")
# A part of a name that says that its value is to be kept from other people's eyes.
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|KEY)S?(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class ArrayAxis:
    """One run for each value of a config key, or of ``nodes``, each in a folder of its own below run.dir."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ArrayAxis:
        """From ``KEY=V1,V2,…``; ConfigError for another form, or for a value that is given twice."""
        key, _, listed = text.partition("=")
        values = tuple(listed.split(",")) if listed else ()
        if not key.strip() or not values or "" in values or len(set(values)) < len(values):
            raise ConfigError(
                f"--array {text!r} is not a key with different values: write for instance --array data.seq_len=8192,16384."
            )
        if key.strip() == "run.dir" or any("/" in value or value in (".", "..") or "\0" in value for value in values):
            raise ConfigError(
                f"--array {text!r} cannot name the folders of its runs: give another key than run.dir, and values without /."
            )
        if key.strip() == NODES and not all(re.fullmatch("[1-9][0-9]*", value) for value in values):
            raise ConfigError(f"--array {text!r} is not a list of numbers of nodes: write for instance --array nodes=1,2,4.")
        return cls(key.strip(), values)


@dataclass(frozen=True)
class Element:
    """One run of a request: its overrides after the request's own, where it lives (absolute), on how many nodes, and what
    tells it from the others (empty where there are none)."""

    overrides: tuple[str, ...]
    run_dir: str
    nodes: int
    label: str = ""


@dataclass(frozen=True)
class JobRequest:
    """A job: ``nodes`` × ``ranks_per_node`` processes of one command. Making one checks it; ConfigError says what is wrong.

    config, overrides: as for ``distattn train``. run_dir, working_dir: absolute paths; the command runs in working_dir.
    time: Slurm's notation (minutes, H:M:S, D-H:M:S), empty for the partition's own limit. stop_seconds: so long before the
    limit the ranks are asked to write a checkpoint. gpus_per_node: 0 for CPUs. env: variables that are written into the job;
    forward: names of variables whose present values travel with it but are written nowhere. exclude: nodes that must not be
    used. array: axes that go in step: the first run has the first value of each. template: path of the user's own batch script
    template. max_restarts: after failures; endings that Slurm or a user
    asked for do not count. port: where ranks meet; 0 derives one from the job's number. task: ``train``, or ``probe``, the
    cluster check, which leaves its result in run_dir. node_counts: numbers of nodes that a restart may have, largest first;
    empty: ``nodes`` alone. server_resources: of each node of attention servers, where these have a kind of node of their own;
    server_nodes, context_nodes: of every context_nodes nodes in a row, the last server_nodes are such nodes.
    """

    config: str
    overrides: tuple[str, ...] = ()
    on: str = "local"
    nodes: int = 1
    ranks_per_node: int = 1
    run_dir: str = ""
    working_dir: str = ""
    name: str = "distattn"
    python: str = "python3"
    task: str = "train"
    time: str = ""
    stop_seconds: int = 120
    partition: str = ""
    account: str = ""
    gpus_per_node: int = 0
    cpus_per_rank: int = 0
    exclude: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    forward: tuple[str, ...] = ()
    container: str = ""
    array: tuple[ArrayAxis, ...] = ()
    template: str = ""
    max_restarts: int = 3
    port: int = 0
    ray_address: str = ""
    node_counts: tuple[int, ...] = ()
    server_resources: Mapping[str, float] = field(default_factory=dict)
    server_nodes: int = 0
    context_nodes: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_array()
        self._check_texts()
        self._check_env()
        self._check_servers()

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def elements(self) -> tuple[Element, ...]:
        """The runs of this request: one, or one for each value of its array."""
        if not self.array:
            return (Element((), self.run_dir, self.nodes),)
        found = []
        for values in zip(*(axis.values for axis in self.array), strict=True):
            settings = {axis.key: value for axis, value in zip(self.array, values, strict=True)}
            label = ",".join(f"{key}={value}" for key, value in settings.items())
            nodes = int(settings.pop(NODES, self.nodes))
            overrides = tuple(f"{key}={value}" for key, value in settings.items())
            found.append(Element((*overrides, f"run.dir={self.run_dir}/{label}"), f"{self.run_dir}/{label}", nodes, label))
        return tuple(found)

    @property
    def runs(self) -> tuple[JobRequest, ...]:
        """Each run as a request of its own."""
        if not self.array:
            return (self,)
        return tuple(
            self.replace(
                overrides=(*self.overrides, *element.overrides),
                run_dir=element.run_dir,
                nodes=element.nodes,
                name=f"{self.name} {element.label}",
                array=(),
            )
            for element in self.elements
        )

    @property
    def jobs(self) -> tuple[JobRequest, ...]:
        """What a target takes at one time: Ray one run; Slurm an array whole, unless its runs differ in their nodes."""
        apart = self.on == "ray" or (self.on == "slurm" and any(axis.key == NODES for axis in self.array))
        return self.runs if apart else (self,)

    def command(self) -> tuple[str, ...]:
        """Arguments of a rank's process, without those of an array's element."""
        if self.task == "probe":
            return (self.python, "-m", "distattn.cli.cluster_probe", self.run_dir)
        return (self.python, "-m", "distattn.cli.main", "train", "--", self.config, *self.overrides)

    def replace(self, **changes: object) -> JobRequest:
        return replace(self, **changes)  # type: ignore[arg-type]

    def _check_choices(self) -> None:
        for option, value, choices in (("--on", self.on, TARGETS), ("task", self.task, TASKS)):
            if value not in choices:
                raise ConfigError(f"{option} {value!r} is unknown: choose one of {', '.join(choices)}.")

    def _check_numbers(self) -> None:
        least = {"nodes": 1, "ranks_per_node": 1, "stop_seconds": 1, "gpus_per_node": 0, "cpus_per_rank": 0}
        for name, minimum in {**least, "max_restarts": 0, "port": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} is {value!r}: it must be a whole number, {minimum} or more.")
        if self.port and not 1024 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: it must be between 1024 and 65535, or 0 for one from the job's number.")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ConfigError(
                f"--ranks-per-node is {self.ranks_per_node} and --gpus-per-node is {self.gpus_per_node}: a rank needs a GPU "
                "of its own, so ask for as many GPUs as ranks, or start fewer ranks."
            )

    def _check_array(self) -> None:
        keys = [axis.key for axis in self.array]
        if len(set(keys)) < len(keys) or len({len(axis.values) for axis in self.array}) > 1:
            counts = ", ".join(f"{axis.key} has {len(axis.values)}" for axis in self.array)
            raise ConfigError(
                f"the values of several --array go in step, the first of each together, so each needs another key and as many "
                f"values: {counts}."
            )
        if NODES in keys and self.nodes > 1:
            raise ConfigError(
                f"--nodes is {self.nodes}, and --array {NODES}=… gives each run its own number of nodes: leave one of them out."
            )

    def _check_texts(self) -> None:
        if self.time and not _TIME.fullmatch(self.time):
            raise ConfigError(f"--time is {self.time!r}: write minutes, H:M:S or D-H:M:S, for instance 2:30:00.")
        for option, value in (
            ("--partition", self.partition),
            ("--account", self.account),
            *(("--exclude", n) for n in self.exclude),
        ):
            if value and not _WORD.fullmatch(value):
                raise ConfigError(f"{option} is {value!r}: it may hold letters, digits and _ . , - [ ], and not begin with -.")
        for option, value in (("run.dir", self.run_dir), ("the working directory", self.working_dir)):
            if value and not Path(value).is_absolute():
                raise ConfigError(f"{option} of a job is {value!r}: it must be an absolute path.")
        if not self.name:
            raise ConfigError("--name is empty: give the job a name, or leave the option out.")
        texts = (
            self.config,
            *self.overrides,
            self.name,
            self.python,
            self.container,
            self.template,
            self.run_dir,
            self.working_dir,
        )
        for text in texts:
            if "\0" in text:
                raise ConfigError(f"{text!r} holds a NUL character, which no command line can carry.")

    def _check_env(self) -> None:
        for name in (*self.env, *self.forward):
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"--env {name!r} is not the name of an environment variable: use letters, digits and _.")
            if name.startswith(("SLURM_", "SBATCH_")):
                raise ConfigError(f"--env {name} is refused: Slurm sets the variables that begin with SLURM_ and SBATCH_.")
        for name, value in self.env.items():
            if "\0" in value:
                raise ConfigError(f"the value of --env {name} holds a NUL character, which no environment can carry.")
            if is_secret(name):
                raise ConfigError(
                    f"--env {name}=… is refused: the name says that it is a secret, and the value would be written into the "
                    f"job. Set it in your shell and pass --env {name}: the value then travels with the job, unwritten."
                )

    def _check_servers(self) -> None:
        for name, amount in self.server_resources.items():
            if not _VARIABLE.fullmatch(name) or not amount > 0:
                raise ConfigError(
                    f"--server-resource {name}={amount:g} is not a resource: write a name of letters, digits and _, and an "
                    "amount above 0, for instance attention_server=1."
                )
        if self.server_resources and self.gpus_per_node and self.server_resources.get("GPU", 0) < self.ranks_per_node:
            raise ConfigError(
                f"--server-resource gives the nodes of attention servers {self.server_resources.get('GPU', 0):g} GPUs for "
                f"{self.ranks_per_node} ranks, which need one each: add --server-resource GPU={self.ranks_per_node}."
            )


def parse_resources(options: Sequence[str]) -> dict[str, float]:
    """``NAME=AMOUNT`` options; ConfigError for another form."""
    resources = {}
    for option in options:
        name, _, amount = option.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", amount):
            raise ConfigError(f"--server-resource {option!r} is not NAME=AMOUNT: write for instance attention_server=1.")
        resources[name] = float(amount)
    return resources


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value should not be written down."""
    return _SECRET.search(name) is not None


def parse_env(options: Sequence[str], present: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """``NAME=VALUE`` and ``NAME`` options as (variables to write, names to forward); ConfigError if a name is not set."""
    written: dict[str, str] = {}
    forwarded: list[str] = []
    for option in options:
        name, equals, value = option.partition("=")
        if equals:
            written[name] = value
        elif name in present:
            forwarded.append(name)
        else:
            raise ConfigError(f"--env {name} names a variable that is not set here: set it, or write --env {name}=VALUE.")
    return written, tuple(forwarded)


@dataclass(frozen=True)
class JobRecord:
    """What is remembered of a submitted run. id: what users type; target_id: what the target calls it.

    run_dir: absolute. log: the target's own log (not the ranks'). submitted_at: seconds since 1970. details: what the target
    needs to find the job again (an address, a process's start time).
    """

    id: str
    target: str
    target_id: str
    name: str
    run_dir: str
    nodes: int
    ranks_per_node: int
    log: str
    submitted_at: float
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobState:
    """state: one of STATES; reason: a sentence or a word of the target, may be empty; restarts: how often it began anew."""

    state: str
    reason: str = ""
    restarts: int = 0

    @property
    def active(self) -> bool:
        return self.state in ACTIVE_STATES


class Target(Protocol):
    """Where jobs run. Methods take one of a request's ``jobs``; they raise ConfigError for what the user can mend, and
    LaunchError for what failed."""

    name: str

    def why_not(self) -> str | None:
        """Why no job can be submitted from here now, in a sentence that says what to do; None if one can."""
        ...

    def check(self, request: JobRequest) -> None:
        """ConfigError for a request that this target cannot run; asks the cluster, submits nothing."""
        ...

    def preview(self, request: JobRequest) -> str:
        """Exactly what ``submit`` would submit, and the ports that it opens; asks nobody and writes nothing."""
        ...

    def submit(self, request: JobRequest) -> list[JobRecord]:
        """Submit it; one record for each element of the request."""
        ...

    def state(self, record: JobRecord) -> JobState: ...

    def cancel(self, record: JobRecord, *, now: bool = False) -> str:
        """End it: its ranks write a checkpoint first, unless ``now``; a sentence that says what was done."""
        ...
