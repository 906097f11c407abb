"""A scheduler's options from text, as the command line and configs give them: ``["head_ranks=2", "pieces=4"]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from distattn.errors import ConfigError
from distattn.parallel.schedulers import find_scheduler

_WORDS = {"true": True, "false": False, "none": None}


def parse_options(strategy: str, settings: Sequence[str]) -> Any:
    """The options dataclass of a scheduler from ``key=value`` settings, or None where there are none.

    Raises ConfigError naming the setting and what is allowed.
    """
    if not settings:
        return None
    if strategy == "auto":
        raise ConfigError(f"the option {settings[0]!r} belongs to one strategy: name it instead of auto")
    scheduler = find_scheduler(strategy)
    known = {x.name: x for x in fields(scheduler.options)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or key not in known:
            raise ConfigError(f"options of {strategy} are {', '.join(f'{name}=…' for name in known)}; got {setting!r}")
        values[key] = _value(strategy, known[key], text)
    return scheduler.options(**values)


def _value(strategy: str, known: Field[Any], text: str) -> Any:
    """text as the field's type, such as "int | None"."""
    kinds = str(known.type).split(" | ")
    word = text.lower()
    if (word in ("true", "false") and "bool" in kinds) or (word == "none" and "None" in kinds):
        return _WORDS[word]
    for name, kind in (("int", int), ("float", float), ("str", str)):
        if name in kinds:
            try:
                return kind(text)
            except ValueError:
                break
    raise ConfigError(f"option {known.name} of {strategy} must be {' or '.join(kinds)}, got {text!r}")
