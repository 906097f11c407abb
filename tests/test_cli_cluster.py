"""``distattn doctor --cluster``: the order of pairs, what is odd (plan only), and a link that is slow (3 gloo ranks)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Set
from itertools import combinations
from pathlib import Path

import pytest
import torch

from distattn.cli.cluster import Finding, hosts_to_exclude, judge
from distattn.cli.cluster_probe import Device, GroupWire, Link, measure_device, probe, rounds
from distattn.cli.main import main
from distattn.testing import run_ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
def test_every_pair_once_and_no_rank_twice_in_a_round(world: int) -> None:
    found = rounds(world)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(world), 2))
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(found) == (world - 1 if world % 2 == 0 else world)


def cluster(slow: Set[tuple[int, int]] = frozenset(), weak: Set[int] = frozenset()) -> tuple[list[Device], list[Link]]:
    """Three nodes of two ranks; links within a node are ten times as fast as those between nodes."""
    devices = [Device(r, f"n{r // 2}", "gpu", 400.0 if r in weak else 700.0, "") for r in range(6)]
    links = [
        Link(a, b, 1e-5, (1e11 if a // 2 == b // 2 else 1e10) / (3 if (a, b) in slow else 1), "")
        for a in range(6)
        for b in range(6)
        if a != b
    ]
    return devices, links


def test_nothing_is_odd_where_links_differ_by_kind_alone() -> None:
    assert judge(*cluster()) == []


def test_the_slow_link_and_the_odd_device_are_named() -> None:
    devices, links = cluster({(0, 5), (0, 1)}, {3})
    assert [finding.text for finding in judge(devices, links)] == [
        "rank 3 on n1 computes 400 TFLOP/s, its peers 700",
        "the link from rank 0 on n0 to rank 1 on n0 moves 33.3 GB/s, its peers 100",
        "the link from rank 0 on n0 to rank 5 on n2 moves 3.33 GB/s, its peers 10",
    ]


def test_wrong_results_are_findings_even_without_peers() -> None:
    devices = [Device(0, "a", "gpu", 0.0, "RuntimeError: ECC"), Device(1, "b", "gpu", 700.0, "")]
    links = [Link(0, 1, 1e-5, 1e10, "2 of 10 messages arrived changed"), Link(1, 0, 1e-5, 1e10, "")]
    assert [finding.text for finding in judge(devices, links)] == [
        "rank 0 on a (gpu): RuntimeError: ECC",
        "the link from rank 0 on a to rank 1 on b: 2 of 10 messages arrived changed",
    ]


def test_the_fewest_nodes_are_left_out() -> None:
    devices, _ = cluster()
    findings = [Finding("", ("n0", "n1")), Finding("", ("n1", "n2")), Finding("", ("n1",))]
    assert hosts_to_exclude(findings, devices) == ["n1"]
    assert hosts_to_exclude([], devices) == []
    everywhere = [Finding("", (host,)) for host in ("n0", "n1", "n2")]
    assert hosts_to_exclude(everywhere, devices) == []


def test_a_device_is_checked_and_timed() -> None:
    device = measure_device(0, torch.device("cpu"))
    assert device.error == ""
    assert device.tflops > 0


class LameWire(GroupWire):
    """What goes to rank 2 is late, and from rank 1 to rank 0 it arrives changed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def send(self, tensor: torch.Tensor, to: int) -> None:
        if to == 2:
            time.sleep(0.15)
        super().send(tensor, to)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        super().receive(tensor, source)
        if (source, self.rank) == (1, 0) and tensor.numel() > 8:
            tensor[-1] += 1


def _probe(rank: int, world: int) -> dict | None:
    return probe(rank, world, torch.device("cpu"), LameWire(rank))


def test_a_lame_link_shows_in_the_matrix() -> None:
    found, *others = run_ranks(_probe, 3, timeout_s=240)
    assert others == [None, None]
    assert found is not None
    assert [device["rank"] for device in found["devices"]] == [0, 1, 2]
    links = {(link["source"], link["target"]): Link(**link) for link in found["links"]}
    assert sorted(links) == [(a, b) for a in range(3) for b in range(3) if a != b]
    # Both directions wait for rank 2's answers or for what goes to it; 0 and 1 talk freely.
    assert all(link.round_trip_s >= 0.12 for pair, link in links.items() if pair[1] == 2)
    assert links[0, 1].round_trip_s < 0.12
    assert {pair: link.error for pair, link in links.items() if link.error} == {(1, 0): "5 of 10 messages arrived changed"}


def test_the_command_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks have no peers to be slower than, so the exit code is 0 on a busy machine too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distattn", "doctor", "--cluster", "--ranks-per-node", "2", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr().out
    assert caught.value.code == 0, shown
    found = json.loads(shown[shown.index("{") :])
    assert (len(found["devices"]), len(found["links"]), found["findings"]) == (2, 2, [])


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--on", "ray"], "--cluster runs on local or slurm, not on ray"),
        (["--nodes", "2"], "--nodes is 2, and --on local has one node"),
    ):
        monkeypatch.setattr(sys, "argv", ["distattn", "doctor", "--cluster", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
