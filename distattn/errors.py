"""The errors that distattn raises at its users.

Every message says what was given, what is allowed and what to change. ``assert`` is kept for our own invariants.
"""

from __future__ import annotations


class DistattnError(Exception):
    """Base of every error that distattn raises on purpose."""


class ConfigError(DistattnError, ValueError):
    """A configuration or command line that cannot be run (exit code 2)."""


class DataError(ConfigError):
    """A data source, tokenizer or cache that cannot be used."""


class MaskError(DistattnError, ValueError):
    """A mask that is not a union of disjoint banded rectangles, or an operation that is not defined on it."""


class LayoutError(DistattnError, ValueError):
    """A layout that does not own every row exactly once."""


class PlanError(DistattnError, ValueError):
    """A schedule that cannot be planned for this mask, shape and number of ranks."""


class VerifyError(DistattnError, ValueError):
    """A program that breaks an invariant; the message names it."""


class UnsupportedError(DistattnError, ValueError):
    """A case that no installed kernel or transport supports; the message lists each one's reason.

    Integrations give it in parts: the feature, the plan (or integration) that does not support it, the reason, and the
    alternative that the user has.
    """

    def __init__(self, feature: str, plan: str = "", reason: str = "", alternative: str = "") -> None:
        self.feature, self.plan, self.reason, self.alternative = feature, plan, reason, alternative
        message = f"{feature} is not supported by {plan}: {reason}; {alternative}" if plan else feature
        super().__init__(message)

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, str, str, str]]:
        # The message is made of the parts: what travels between processes are these.
        return type(self), (self.feature, self.plan, self.reason, self.alternative)


class InputError(DistattnError, ValueError):
    """A tensor argument of the wrong shape, dtype, device or layout; the message names the argument."""


class AgreementError(DistattnError, RuntimeError):
    """Ranks called the same collective with different plans; the message names the ranks."""


class TransportError(DistattnError, RuntimeError):
    """A transfer that failed or did not finish in time; the message names ranks, stage and buffer."""


class CheckpointError(DistattnError, RuntimeError):
    """A checkpoint that cannot be written, read or trusted."""


class TrainingError(DistattnError, RuntimeError):
    """Training cannot go on (non-finite loss, a lost rank); the message names the step and the last good checkpoint."""


class LaunchError(DistattnError, RuntimeError):
    """A cluster or launcher that did not do what it was asked (a lost connection, a refused submission); says what it said."""
