"""Plan only: the layers import one way, the public names are pinned, and each subpackage has one identity."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import distattn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distattn"

# What the modules of each part may import of ours; a module's own part is always allowed.
ALLOWED = {
    "errors": set(),
    "bounded_store": set(),
    "bands": {"errors"},
    "mask_flex": {"errors", "bands"},
    "mask": {"errors", "bands", "mask_flex"},
    "calibration": {"errors"},
    "kernels": {"errors", "calibration"},
    "parallel": {"errors", "bounded_store", "bands", "calibration", "mask", "kernels"},
    "launchers": {"errors", "bounded_store"},
    "data": {"errors"},
    "plan_description": {"errors", "kernels", "parallel", "planning"},
    "planning": {"errors", "bands", "mask", "kernels", "parallel", "row_gather", "plan_description"},
    "attention": {"errors", "bands", "mask", "kernels", "parallel", "planning"},
    "linear_planning": {"errors", "kernels", "parallel"},
    "linear": {"errors", "kernels", "parallel", "linear_planning"},
    "short_convolution": {"errors", "parallel", "linear_planning"},
    "running_softmax": {"errors", "kernels", "parallel", "linear_planning"},
    "agent_attention": {"errors", "kernels", "parallel", "linear_planning"},
    "momentum_memory_planning": {"errors", "parallel", "linear_planning"},
    "momentum_memory": {"errors", "kernels", "parallel", "momentum_memory_planning"},
    "pingpong": {"errors", "mask", "parallel", "planning", "attention"},
    "models": {
        "errors",
        "mask",
        "planning",
        "attention",
        "linear",
        "short_convolution",
        "running_softmax",
        "momentum_memory",
        "agent_attention",
        "pingpong",
    },
    "testing": {"errors", "launchers"},
}

# Frameworks that only their own adapter may import.
FRAMEWORKS = {"megatron", "deepspeed", "ray", "transformers"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below distattn, file) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "distattn":
                yield from (f"distattn.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n or "distattn") for n, p in modules()])
def test_layers(name: str, path: Path) -> None:
    part = name.split(".")[0]
    for imported in imports(path):
        top, *rest = imported.split(".")
        assert top not in {"kernels", "parallel", "launchers"}, f"{name} imports the link {top}, not distattn.{top}"
        if top in FRAMEWORKS:
            adapter = name.startswith("integrations.") or (top == "ray" and name.startswith("launchers.ray_"))
            assert adapter, f"{name} imports {top}: only its adapter may"
        if top == "distattn" and rest and part in ALLOWED:
            assert rest[0] == part or rest[0] in ALLOWED[part], f"{name} must not import {imported}"


def test_public_names() -> None:
    assert sorted(distattn.__all__) == [
        "Layout",
        "Mask",
        "Plan",
        "attention",
        "attention_begin",
        "attention_compute",
        "attention_finish",
        "checkpoint_contexts",
        "checkpoint_policy",
        "errors",
        "linear_attention",
        "linear_attention_step",
        "plan",
    ]
    for name in distattn.__all__:
        assert getattr(distattn, name) is not None


@pytest.mark.parametrize("part", ["kernels", "parallel", "launchers"])
def test_one_identity(part: str) -> None:
    """The link at the root reads as the user asked, but cannot become a second copy of the package."""
    link = ROOT / part
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / part
    spec = importlib.util.spec_from_file_location(part, link / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"import distattn.{part}, not {part}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
