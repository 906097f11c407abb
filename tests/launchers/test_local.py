"""Local ranks as real processes: what they are given, how they end, and that nothing of them stays."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distattn.errors import ConfigError
from distattn.launchers import local
from distattn.launchers.local import init_from_environment, joined_by_environment, launch_local, threads_per_rank


def python(code: str, *arguments: str) -> list[str]:
    """A rank's command that starts fast: no site packages."""
    return [sys.executable, "-S", "-c", "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + code, *arguments]


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "Läufe mit Leerzeichen" / "logs"


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no temporary file, no changed signal handler after any test here."""
    monkeypatch.setattr(local.tempfile, "tempdir", str(tmp_path))
    for number in local._STOP_SIGNALS:  # nohup, and shells that start us in the background, have some of them ignored
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    handlers = [signal.getsignal(number) for number in local._STOP_SIGNALS]
    threads = threading.active_count()
    others = set(psutil.Process().children(recursive=True))  # of earlier tests, such as multiprocessing's resource tracker
    yield
    wait_for(lambda: set(psutil.Process().children(recursive=True)) <= others)
    wait_for(lambda: threading.active_count() <= threads)
    assert not list(tmp_path.glob("distattn-*"))
    assert [signal.getsignal(number) for number in local._STOP_SIGNALS] == handlers


def test_ranks_are_told_who_they_are(logs: Path, tmp_path: Path) -> None:
    code = """
import json
json.dump(dict(os.environ), open(f"{sys.argv[1]}/{rank}.json", "w"))
open(os.environ["DISTATTN_STORE"], "a").close()
assert os.getsid(0) == os.getpid() and sys.stdin.read() == ""
"""
    assert launch_local(python(code, str(tmp_path)), 3, log_dir=logs, env={"COLOUR": "grün $(touch x)"}) == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, env in enumerate(told):
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
        assert env["PYTHONSAFEPATH"] == "1"
        assert env["COLOUR"] == "grün $(touch x)"
        assert int(env["OMP_NUM_THREADS"]) == threads_per_rank(3)[0]
        assert env["DISTATTN_STORE"] == told[0]["DISTATTN_STORE"]


def test_arguments_arrive_as_they_are(logs: Path, tmp_path: Path) -> None:
    words = ["a b", "$(touch x)", "'\"`", "--flag=ü", ""]
    code = "import json; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    assert launch_local(python(code, str(tmp_path / "argv"), *words), 1, log_dir=logs) == 0
    assert json.loads((tmp_path / "argv").read_text()) == words


def test_rank_0_speaks_to_us_and_the_others_to_their_logs(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
for piece in ("o", "ut ", f"{rank} ü", "\\n"):  # the two streams' lines, piece by piece in turn
    sys.stdout.write(piece)
    sys.stdout.flush()
    sys.stderr.write(piece.replace("o", "e"))
    sys.stderr.flush()
    time.sleep(0.02)
sys.stdout.write("no end of line")
"""
    assert launch_local(python(code), 2, log_dir=logs) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out 0 ü\nno end of line", "eut 0 ü\n")
    assert sorted((logs / "rank-0.log").read_text().splitlines()) == ["eut 0 ü", "no end of line", "out 0 ü"]
    assert (logs / "rank-1.log").read_text().endswith("no end of line")


def test_much_output_is_passed_on_whole(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(python("sys.stdout.write('x' * 3_000_000)"), 1, log_dir=logs) == 0
    assert len(capfd.readouterr().out) == 3_000_000


def test_a_rank_that_raises(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs.mkdir(parents=True)
    (logs / "rank-1.log").write_text("of an earlier run\n")
    code = "time.sleep(60 if rank != 1 else 0.2); raise ValueError('no such number')"
    began = time.monotonic()
    assert launch_local(python(code), 3, log_dir=logs) == 1
    assert time.monotonic() - began < 10
    message = capfd.readouterr().err
    assert "rank 1 exited with status 1; stopping the other 2. The end of its log" in message
    assert "ValueError: no such number" in message
    assert "earlier" not in message


def test_a_rank_that_is_killed_while_another_ignores_sigterm(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    print("my last words")
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    began = time.monotonic()
    assert launch_local(python(code), 3, log_dir=logs, failure_grace_s=0.5) == 1
    assert time.monotonic() - began < 10
    message = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in message
    assert "my last words" in message
    assert "killing the ranks that did not stop in time: 0, 2" in message


def test_bad_usage_in_a_rank_is_bad_usage_of_all(logs: Path) -> None:
    assert launch_local(python("sys.exit(2)"), 2, log_dir=logs) == 2


def test_a_killed_rank_is_named_before_those_that_fail_for_want_of_it() -> None:
    class Dead:
        def __init__(self, index: int, code: int | None) -> None:
            self.index, self.process = index, type("Process", (), {"returncode": code})

    ranks = [Dead(0, 1), Dead(1, None), Dead(2, -9), Dead(3, 0)]
    assert local._first_failure(ranks) is ranks[2]  # type: ignore[arg-type]
    assert local._first_failure([ranks[1], ranks[3]]) is None  # type: ignore[list-item]


def test_a_command_that_does_not_exist(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(["/no/such/program"], 1, log_dir=logs) == 1
    assert "/no/such/program cannot be started: No such file or directory" in capfd.readouterr().err


def test_bad_calls(logs: Path) -> None:
    with pytest.raises(ConfigError, match="0 ranks"):
        launch_local(["true"], 0, log_dir=logs)
    with pytest.raises(ConfigError, match="give at least one rank and a command"):
        launch_local([], 1, log_dir=logs)


COUNTS_SIGTERMS = """
count = 0
def stop(number, frame):
    global count
    count += 1
signal.signal(signal.SIGTERM, stop)
open(f"{sys.argv[1]}/ready-{rank}", "w").close()
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print("signals", count)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_every_rank_once(
    logs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def stop() -> None:
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert launch_local(python(COUNTS_SIGTERMS, str(tmp_path)), 2, log_dir=logs) == 0
    thread.join()
    assert [(logs / f"rank-{rank}.log").read_text() for rank in (0, 1)] == ["signals 1\n"] * 2
    assert f"received {number.name}: asking 2 ranks to stop" in capfd.readouterr().err


@pytest.mark.parametrize("second_signal", [False, True])
def test_ranks_that_do_not_stop_are_killed(logs: Path, tmp_path: Path, second_signal: bool) -> None:
    code = 'signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f"{sys.argv[1]}/ready-{rank}", "w"); time.sleep(60)'

    def stop() -> None:
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        if second_signal:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    began = time.monotonic()
    grace = 60.0 if second_signal else 0.2
    assert launch_local(python(code, str(tmp_path)), 2, log_dir=logs, stop_grace_s=grace) == 1
    thread.join()
    assert time.monotonic() - began < 20


def test_what_a_rank_started_goes_with_it(logs: Path, tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1], 'w'))"
    assert launch_local(python(code, str(tmp_path / "pid")), 1, log_dir=logs) == 0
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_descriptors_are_passed_to_ranks_only(logs: Path, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        assert launch_local(python("os.fstat(int(sys.argv[1]))", str(lock.fileno())), 1, log_dir=logs) == 1
        passed = [lock.fileno()]
        assert launch_local(python("os.fstat(int(sys.argv[1]))", str(passed[0])), 1, log_dir=logs, pass_fds=passed) == 0


LAUNCHER = """
import sys
from distattn.launchers.local import launch_local
sys.exit(launch_local(sys.argv[2:], 2, log_dir=sys.argv[1]))
"""


def test_ranks_die_with_a_launcher_that_is_killed(logs: Path, tmp_path: Path) -> None:
    code = 'signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f"{sys.argv[1]}/{os.getpid()}.pid", "w"); time.sleep(60)'
    command = [sys.executable, "-c", LAUNCHER, str(logs), *python(code, str(tmp_path))]
    # Its own folder for temporary files: a killed launcher leaves the (empty) meeting place.
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    launcher = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert all(psutil.pid_exists(pid) for pid in pids)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), timeout_s=5)


def test_a_guard_whose_launcher_is_gone_starts_nothing(tmp_path: Path) -> None:
    guard = [sys.executable, "-I", "-S", str(local._GUARD), str(os.getppid())]
    assert subprocess.run([*guard, "touch", str(tmp_path / "x")], check=False).returncode == 1
    assert not (tmp_path / "x").exists()


def test_a_terminal_stays_one_for_rank_0(logs: Path) -> None:
    ours, theirs = pty.openpty()
    code = "print(sys.stdout.isatty(), sys.stderr.isatty(), os.isatty(1) and os.get_terminal_size().columns)"
    command = [sys.executable, "-c", LAUNCHER, str(logs), *python(code)]
    launcher = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "99"})
    os.close(theirs)
    assert launcher.wait(60) == 0
    assert os.read(ours, 1000) == b"True False 99\r\n"
    os.close(ours)
    assert (logs / "rank-0.log").read_bytes() == b"True False 99\n"
    assert (logs / "rank-1.log").read_text() == "False False False\n"


JOINS = """
import psutil, torch, torch.distributed as dist
from distattn.launchers.local import init_from_environment, joined_by_environment
assert joined_by_environment()
rank, world = init_from_environment("cpu", timeout_s=30)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
assert all(ip in ("127.0.0.1", "::1") for ip in listening), listening
assert listening, "gloo should listen somewhere, or this test looks in the wrong place"
dist.barrier()
print(rank, world, total.item(), dist.get_backend())
dist.destroy_process_group()
"""


def test_ranks_join_and_listen_on_the_loopback_only(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = launch_local([sys.executable, "-c", JOINS], 2, log_dir=logs)
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert captured.out == "0 2 3.0 gloo\n"
    assert (logs / "rank-1.log").read_text() == "1 2 3.0 gloo\n"


def test_threads_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_num_cores", lambda: 7)
    assert threads_per_rank(2, {}) == (3, "7 cores shared by 2 ranks")
    assert threads_per_rank(9, {}) == (1, "7 cores shared by 9 ranks")
    assert threads_per_rank(2, {"OMP_NUM_THREADS": "5"}) == (5, "OMP_NUM_THREADS is set")
    assert threads_per_rank(2, {"OMP_NUM_THREADS": "many"})[0] == 3


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DISTATTN_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_without_an_environment(no_ranks: pytest.MonkeyPatch) -> None:
    assert not joined_by_environment()
    assert init_from_environment() == (0, 1)


@pytest.mark.parametrize(
    ("env", "device", "message"),
    [
        ({"RANK": "0"}, "cpu", "WORLD_SIZE is '', but a rank needs"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "cpu", "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "cpu", "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "but MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "tpu", "device_type is 'tpu'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cuda", "LOCAL_RANK is ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "64"}, "cuda", r"LOCAL_RANK is 64, and this host shows \d GPUs"),
    ],
)
def test_an_environment_that_makes_no_sense(
    no_ranks: pytest.MonkeyPatch, env: dict[str, str], device: str, message: str
) -> None:
    for name, value in env.items():
        no_ranks.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_from_environment(device)
