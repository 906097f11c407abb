"""What every integration refuses, alike on all ranks and before any communication: nothing is dropped silently.

Frameworks hand masks, biases, dropout and options through keyword arguments that an attention function may ignore. Each
check here raises ``UnsupportedError`` with the reason and what to do instead; ``plan`` names who refuses, such as
``"distattn:ring in layer 3"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distattn.errors import UnsupportedError


def refuse_dropout(probability: float, plan: str, alternative: str = "set the attention dropout to 0") -> None:
    """Ranks would draw different masks for the same pair."""
    if probability > 0:
        reason = "the ranks that share a sequence would drop different pairs, in forward and in backward"
        raise UnsupportedError(f"attention dropout of {probability}", plan, reason, alternative)


def refuse_tensor_mask(mask: Any, plan: str, alternative: str) -> None:
    """A dense mask says nothing about global positions and is quadratic in the length."""
    if mask is not None:
        shape = f" of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f" ({type(mask).__name__})"
        reason = "a rank's rows of it do not say which tokens of the whole sequence they are, and it grows with the square"
        raise UnsupportedError(f"an attention mask as a tensor{shape}", plan, reason, alternative)


def refuse_bias(bias: Any, plan: str, alternative: str = "leave it out, or use distattn.attention's key_bias") -> None:
    """A bias for each pair cannot follow keys that travel."""
    if bias is not None:
        raise UnsupportedError(
            "a bias of attention scores", plan, "it cannot follow keys that travel between ranks", alternative
        )


def refuse_unknown_arguments(arguments: Mapping[str, Any], plan: str) -> None:
    """Anything that reached the call through ``**kwargs`` and is not None would have an effect elsewhere."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        names = ", ".join(given)
        raise UnsupportedError(f"the argument {names}", plan, "it would be ignored without a word", "pass None, or drop it")


def refuse_cache(num_queries: int, num_keys: int, plan: str) -> None:
    """Queries against a cache of keys: positions are the cache's, not the layout's."""
    if num_queries != num_keys:
        reason = "queries and keys of one call must be the same rows, and a cache has positions of its own"
        alternative = "use the framework's own attention for inference"
        raise UnsupportedError(f"a call of {num_queries} queries over {num_keys} keys (a KV cache)", plan, reason, alternative)


def refuse_torch_context_parallel(plan: str) -> None:
    """torch's ``context_parallel`` shards the same rows once more while it is entered."""
    import torch.nn.functional as F

    # Entered, it replaces this function by one of its own.
    if F.scaled_dot_product_attention.__module__.startswith("torch.distributed"):
        reason = "the sequence would be sharded twice"
        raise UnsupportedError("a call inside torch's context_parallel", plan, reason, "leave that context")
