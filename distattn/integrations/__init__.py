"""Adapters to training frameworks, a module each; only they import their framework.

In a checkout the links ``kernels``, ``parallel`` and ``launchers`` at the root may be importable, and transformers takes the
first for Hugging Face's package of that name: they are hidden here, before any framework is imported.
"""

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent

for _name in ("kernels", "parallel", "launchers"):
    if _name not in sys.modules:
        _spec = importlib.util.find_spec(_name)
        if _spec is not None and _spec.origin is not None and Path(_spec.origin).resolve().is_relative_to(_PACKAGE):
            sys.modules[_name] = None  # pyright: ignore[reportArgumentType]
