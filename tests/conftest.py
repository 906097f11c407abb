"""Shared by all tests: import path, GPU tests, order, and the list of what did not run and why.

Tests may be shared out over processes, a file to each (pytest-xdist: ``-n N --dist loadfile --no-loadscope-reorder``). Reports
then come together in the process that shares out, and only there is the list written.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

_FIRST = ("tests/ray/test_ray.py", "tests/faults/test_faults.py", "tests/slurm/test_guide.py", "tests/slurm/test_slurm.py")
"""Files that mostly wait, longest first: begun at once, they wait while other processes compute."""

# Last on the path, so that an installed distattn wins over the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-gpu-may-skip", action="store_true", help="fail if a test without the gpu mark did not run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu(n)`` need n CUDA devices, one by default. Files that mostly wait come first."""
    rank = {name: number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    devices = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark is None:
            continue
        needed = mark.args[0] if mark.args else 1
        if devices < needed:
            item.add_marker(pytest.mark.skip(reason=f"gpu: needs {needed} CUDA device(s), {devices} here"))


def _not_run(terminal: pytest.TerminalReporter) -> Counter[str]:
    """Reasons of skipped tests and modules, with how many each."""
    reasons: Counter[str] = Counter()
    for report in terminal.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for report in terminal.stats.get("xfailed", []):
        reasons[f"expected to fail: {report.nodeid}"] += 1
    return reasons


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = _not_run(terminalreporter)
    terminalreporter.section("did not run")
    if not reasons:
        terminalreporter.write_line("nothing: every test ran")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4d}  {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--only-gpu-may-skip") or hasattr(session.config, "workerinput"):
        return  # a process among several sees its own share alone
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(terminal, pytest.TerminalReporter)
    if any(not reason.startswith("gpu: ") for reason in _not_run(terminal)) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
