"""Which backend computes a case, and what the user is told: plan only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distattn.errors import UnsupportedError
from distattn.kernels import BACKENDS, Case, backend_report, choose_backend
from distattn.kernels import registry as registry_module
from distattn.kernels.softmax import triton_backend

CPU = Case("cpu", torch.float32, 64, 64, 8, 2)
CUDA = replace(CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_fused_kernel_on_cpu(dtype: torch.dtype) -> None:
    backend, reason = choose_backend(replace(CPU, dtype=dtype))
    assert backend.name == "flash_cpu"
    assert "fastest" in reason


@pytest.mark.parametrize("feature", ["softcap", "lse_gradient"])
def test_auto_says_what_it_passed_over_and_why(feature: str) -> None:
    backend, reason = choose_backend(replace(CPU, **{feature: True}))
    assert backend.name == "reference"
    assert f"flash_cpu {BACKENDS['flash_cpu'].why_not(replace(CPU, **{feature: True}))}" in reason


def test_an_unknown_kernel_lists_what_exists() -> None:
    with pytest.raises(UnsupportedError, match="kernel='flsh' is unknown; it may be auto, reference, flash_cpu"):
        choose_backend(CPU, "flsh")


def test_an_asked_for_kernel_is_never_replaced() -> None:
    assert choose_backend(CPU, "reference")[0].name == "reference"
    with pytest.raises(
        UnsupportedError, match=r"kernel=flash_cpu cannot compute .* softcap: it has no soft-cap\. Use .* reference"
    ):
        choose_backend(replace(CPU, softcap=True), "flash_cpu")
    with pytest.raises(UnsupportedError, match=r"kernel=cudnn cannot compute float32 .* on cpu: it runs on cuda"):
        choose_backend(CPU, "cudnn")


def test_a_case_that_no_kernel_computes_is_an_error_with_every_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"No kernel computes float8_e4m3fn .*: flash_cpu .*; reference .*\."):
        choose_backend(replace(CPU, dtype=torch.float8_e4m3fn))


def test_the_report_has_every_backend() -> None:
    report = backend_report(CPU)
    assert set(report) == set(BACKENDS)
    assert report["reference"] is None
    assert report["flash"] == "runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("capability", "change", "expected"),
    [
        ((9, 0), {}, "cudnn"),
        ((8, 0), {}, "flash"),
        ((9, 0), {"head_dim": 192, "value_dim": 128}, "flash"),
        ((9, 0), {"head_dim": 256, "value_dim": 256}, "flash"),
        ((9, 0), {"head_dim": 512, "value_dim": 512}, "reference"),
        ((9, 0), {"dtype": torch.float32}, "triton"),
        ((9, 0), {"softcap": True}, "triton"),
        ((9, 0), {"lse_gradient": True}, "triton"),
        ((9, 0), {"deterministic": True}, "triton"),
        ((9, 0), {"softcap": True, "dtype": torch.float64}, "reference"),
        ((7, 5), {}, "reference"),
    ],
)
def test_auto_on_cuda(
    capability: tuple[int, int], change: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    case = replace(CUDA, **change)  # type: ignore[arg-type]
    backend, _ = choose_backend(case)
    assert backend.name == expected


def test_flash_is_deterministic_when_torch_is_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    case = replace(CUDA, deterministic=True)
    assert "use_deterministic_algorithms" in str(BACKENDS["flash"].why_not(case))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert BACKENDS["flash"].why_not(case) is None


def test_other_devices_have_the_reference() -> None:
    assert registry_module.choose_backend(replace(CPU, device_type="mps"))[0].name == "reference"
