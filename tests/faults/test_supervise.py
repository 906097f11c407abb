"""Whether a run is started again: a pure decision, and the journal that it rests on. Ring 1: no ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distattn.launchers import supervise as module
from distattn.launchers.supervise import (
    HANG_STATUS,
    Failure,
    Journal,
    after_attempt,
    decide,
    kind_of_status,
    num_restarts,
    root_cause,
    supervise,
    wait_until_ready,
)


def killed(step: int) -> Failure:
    return Failure(step, "SIGKILL", "was killed", rank=1)


def test_restarts_are_bounded() -> None:
    failures = [killed(3), killed(9), killed(15)]
    assert decide(failures[:1], restarts=0, max_restarts=2).restart
    assert decide(failures[:2], restarts=1, max_restarts=2).restart
    last = decide(failures, restarts=2, max_restarts=2)
    assert not last.restart
    assert "2 restarts have been used of 2 allowed" in last.reason
    assert "no restarts are allowed" in decide(failures, restarts=0, max_restarts=0).reason


def test_pauses_double_while_the_run_gets_no_further() -> None:
    ways = ["SIGKILL", "hang", "OSError", "RuntimeError"]
    failures = [Failure(7, way) for way in ways]
    pauses = [decide(failures[: n + 1], restarts=n, max_restarts=9, backoff_s=5.0).wait_s for n in range(4)]
    assert pauses == [5.0, 10.0, 20.0, 40.0]
    assert decide([*failures, Failure(8, "hang")], restarts=4, max_restarts=9).wait_s == 5.0, "it got further"
    many = [Failure(7, ways[n % 4]) for n in range(12)]
    assert decide(many, restarts=11, max_restarts=99).wait_s == 300.0


def test_the_same_step_failing_the_same_way_twice_is_the_end() -> None:
    decision = decide([killed(4), killed(9), killed(9)], restarts=2, max_restarts=10)
    assert not decision.restart
    assert decision.reason == (
        "not restarted: step 9 failed the same way twice, so it would again: rank 1: SIGKILL at step 9 (was killed)"
    )
    assert decide([killed(9), Failure(9, "hang")], restarts=1, max_restarts=10).restart, "another way"
    assert decide([killed(9), killed(10)], restarts=1, max_restarts=10).restart, "another step"
    assert decide([killed(9), Failure(9, "hang"), killed(9)], restarts=2, max_restarts=10).restart, "not in a row"


def test_a_bad_config_is_not_tried_again() -> None:
    decision = decide([Failure(1, "ConfigError", "train.steps=many")], restarts=0, max_restarts=5)
    assert not decision.restart
    assert "which a restart cannot change" in decision.reason


def test_the_cause_is_what_the_others_failed_of() -> None:
    lost_peer = Failure(5, "TransportError", rank=0, time=1.0)
    gloo = Failure(5, "RuntimeError", rank=3, time=1.5)
    own = Failure(5, "ValueError", rank=2, time=2.0)
    hang = Failure(5, "hang", rank=0, time=3.0)
    signal = Failure(5, "SIGSEGV", rank=1, time=4.0)
    launcher = Failure(5, "status 1", rank=0, time=0.5)
    node = Failure(5, "lost", time=5.0)
    everything = [lost_peer, gloo, own, hang, signal, node, launcher]
    for expected in (signal, node, hang, own, gloo, lost_peer, launcher):
        assert root_cause(everything) == expected
        everything.remove(expected)
    assert root_cause([]) is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(-9, "SIGKILL"), (137, "SIGKILL"), (143, "SIGTERM"), (HANG_STATUS, "hang"), (2, "ConfigError"), (1, "status 1")],
)
def test_what_an_exit_status_says(status: int, kind: str) -> None:
    assert kind_of_status(status) == kind


def test_the_journal_groups_failures_by_attempt(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.attempts() == []
    assert num_restarts(tmp_path) == 0
    journal.started(4, 0)
    journal.failed(Failure(3, "TransportError", "rank 0 waited", 0))
    journal.failed(Failure(3, "SIGKILL", "größer\n" * 1000, 1))
    with open(journal.path, "a") as stream:
        stream.write('{"event": "failed", "st')  # cut short by a kill
    with open(journal.path, "a") as stream:
        stream.write("\n")
    journal.started(2, 1)
    (first, second) = journal.attempts()
    assert (first.restart, first.ranks, second.restart, second.ranks, second.failure) == (0, 4, 1, 2, None)
    assert first.failure is not None
    assert (first.failure.kind, first.failure.rank) == ("SIGKILL", 1)
    assert len(first.failure.message) == 2000
    assert num_restarts(tmp_path) == 1
    journal.failed(killed(8))
    assert [failure.step for failure in journal.failures_in_a_row()] == [3, 8]
    journal.started(2, 0)  # somebody submitted it anew
    assert journal.failures_in_a_row() == []


def test_a_journal_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path / "gone").failed(killed(1))
    assert "cannot be written" in caplog.text
    assert not (tmp_path / "gone").exists(), "a folder that is gone for a while must not be made anew"


def test_a_launcher_that_knows_the_exit_status_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    journal = Journal(tmp_path)
    journal.started(2, 0)
    assert after_attempt(tmp_path, status=137, restarts=0, max_restarts=3).restart
    noted = journal.attempts()[-1].failure
    assert noted is not None
    assert (noted.step, noted.kind, noted.message) == (3, "SIGKILL", "the command ended with status 137")
    journal.started(2, 1)
    journal.failed(Failure(3, "TransportError", "its peer was killed", 0))
    decision = after_attempt(tmp_path, status=137, restarts=1, max_restarts=3)
    assert "failed the same way twice" in decision.reason, "the kill counts, not what a peer says of it"


def test_supervise_goes_on_until_it_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, said, slept = Journal(tmp_path), [], []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    obstacles = iter(["no space", "no space", None, None])

    def attempt(restart: int) -> int:
        journal.started(2, restart)
        if restart == 2:
            return 0
        journal.failed(killed(5 + restart))
        return 1

    status = supervise(
        attempt, journal, max_restarts=3, backoff_s=1.0, not_ready=lambda: next(obstacles), say=lambda text: said.append(text)
    )
    assert status == 0
    assert said[0].startswith("restart 1 of 3 in 1 s, after rank 1: SIGKILL at step 5")
    assert said[1] == "waiting before the restart: no space"
    assert said[2].startswith("restart 2 of 3")
    assert len(said) == 3
    assert slept == [1.0, module._READY_POLL_S, module._READY_POLL_S, 1.0]


def test_supervise_stops(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    calls: list[int] = []

    def attempt(restart: int) -> int:
        calls.append(restart)
        journal.started(2, restart)
        journal.failed(killed(5))
        return 1

    assert supervise(attempt, journal, max_restarts=9, backoff_s=0.0, say=lambda text: None) == 1
    assert calls == [0, 1], "the second failure was the same as the first"
    assert supervise(lambda restart: None, journal, max_restarts=9, backoff_s=0.0) == 1, "stopped by a user"
    assert supervise(lambda restart: 2, Journal(tmp_path / "x"), max_restarts=9, backoff_s=0.0, say=lambda text: None) == 2


def test_waiting_has_an_end() -> None:
    assert wait_until_ready(lambda: "no space", say=lambda text: None, timeout_s=0.0) == "no space"


def test_lines_are_plain_json(tmp_path: Path) -> None:
    Journal(tmp_path).started(2, 0)
    Journal(tmp_path).failed(killed(1))
    events = [json.loads(line)["event"] for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert events == ["started", "failed"]
