"""gloo: ``distattn doctor`` tries what it reports, names what is missing, and fails when something needed is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distattn.calibration import Calibration, KernelRate, device_name
from distattn.cli import doctor


def taken_version(package: str) -> str:
    """A release that is taken."""
    first, _ = doctor.TAKEN.get(package, ((1,), None))
    return ".".join(map(str, (*first, 0)))


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distattn", "doctor", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_report_of_this_machine() -> None:
    done = run_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    checks = {(check["area"], check["name"]): check for check in report["checks"]}
    assert checks["transports", "mailbox"]["works"]
    assert checks["transports", "gloo"]["detail"] == "2 processes exchanged data"
    assert checks["kernels", "reference"]["works"]
    assert checks["kernels", "linear"]["detail"].startswith("torch: first of torch, triton that can")
    assert checks["packages", "torch"]["needed"]


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "pyarrow" else taken_version(package))
    missing = {check.name: check for check in doctor._package_checks() if not check.works}
    assert missing["pyarrow"].detail == 'for parquet data: pip install "distattn[data]"'
    assert set(missing) == {"pyarrow"}


@pytest.mark.parametrize(
    ("package", "version", "works"),
    [
        ("megatron-core", "0.15.3", False), ("megatron-core", "0.16.1", True), ("megatron-core", "0.20.0rc1", False),
        ("deepspeed", "0.18.9", False), ("transformers", "4.57.1", False), ("transformers", "5.24.0", True),
        ("ray", "2.60.0", True),
    ],
)  # fmt: skip
def test_a_release_that_integrations_do_not_take(
    package: str, version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == package else None)
    (check,) = (check for check in doctor._package_checks() if check.name == package)
    assert (check.works, check.needed) == (works, False)
    assert ("is no release that distattn takes: pip install" in check.detail) == (not works)


def test_broken_transport_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backend: str, world: int) -> str:
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(doctor, "_process_exchange", broken)
    checks = doctor._transport_checks()
    gloo = next(check for check in checks if check.name == "gloo")
    assert not gloo.works
    assert gloo.detail == "RuntimeError: no route to host"
    assert not doctor.Diagnosis(checks).healthy


def test_calibration_is_named_missing_stale_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = device_name()
    assert doctor._calibration_check().detail == f"none of {device}: `distattn bench calibrate` measures kernels and links"
    rate = KernelRate("flash_cpu", False, 64, 1e-5, 0, 0, 0, 1e-12, 1e-12)
    path = Calibration(device, {"torch": torch.__version__}, kernels=(rate,)).save()
    assert doctor._calibration_check() == doctor.Check(
        "kernels", "calibration", True, f"1 kernel rates and 0 link rates of {device}, {path}"
    )
    Calibration(device, {"torch": "1.0"}).save()
    check = doctor._calibration_check()
    assert not check.works
    assert "measured with torch 1.0, run `distattn bench calibrate` again" in check.detail
    path.write_text("{")
    assert "is no calibration" in doctor._calibration_check().detail
