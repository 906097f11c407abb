"""Pools: bounded groups of neighbouring ranks inside which work moves, and the dealing of sequences to them.

    step A   the sequences of an optimizer step   ─▶  (pool, microbatch) bins of equally many, nearly equal attention
    step B   the tasks inside each pool           ─▶  its ranks (``balance``)

Traffic of a pool of 32 to 64 ranks stays in a fast domain, and its plan takes as long whatever the size of the cluster. What
step A leaves uneven no pool can repair: the certificate calls it the pooling loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from distattn.errors import PlanError


def pools_of(num_ranks: int, pool: int, ranks_per_node: int, servers: int = 0) -> np.ndarray:
    """The pool of each rank, int64 [P]: neighbours, at most ``pool`` ranks each, as equal as whole nodes allow.

    pool: most ranks of a pool; 0: all are one. Pools at least as large as a node hold whole nodes (the last one may not be
    full); smaller ones divide each node. servers: this many last ranks serve only; each pool gets its part of them, which
    leaves fewer pools where there are few.
    """
    if pool < 0 or ranks_per_node < 1:
        raise PlanError(f"pool must not be negative and ranks_per_node be positive, got pool={pool} of {ranks_per_node}")
    if pool == 0 or pool >= num_ranks:
        return np.zeros(num_ranks, np.int64)
    homes = num_ranks - servers
    # With servers, a pool's homes leave room for its part of them.
    room = max(1, pool * homes // num_ranks)
    if room < ranks_per_node:
        node, place = np.divmod(np.arange(homes), ranks_per_node)
        parts = -(-ranks_per_node // room)
        _, found = np.unique(node * parts + place * parts // ranks_per_node, return_inverse=True)
    else:
        nodes = -(-homes // ranks_per_node)
        count = -(-nodes // (room // ranks_per_node))
        found = np.arange(homes) // ranks_per_node * count // nodes
    found = found.reshape(-1).astype(np.int64)
    count = int(found.max()) + 1
    if servers:
        if servers < count:
            raise PlanError(
                f"{servers} servers cannot be divided over {count} pools of at most {pool} ranks: give at least {count} "
                "servers, or larger pools"
            )
        found = np.concatenate([found, np.arange(servers) * count // servers])
    return found


def deal_sequences(work: Sequence[float] | np.ndarray, num_pools: int, num_microbatches: int) -> np.ndarray:
    """Step A: the bin ``pool · num_microbatches + microbatch`` of each sequence, int64 [N].

    work: attention work of each packed sequence of one optimizer step (the area of its mask). The costliest comes first, each
    to the bin with the least work that has a slot free; all bins get equally many sequences. The step's sequences stay the
    same, and with a loss that is weighted by tokens so does the update, up to rounding. Four sequences a pool and microbatch
    or more even out well, fewer do not.
    """
    amounts = np.asarray(work, np.float64)
    bins = num_pools * num_microbatches
    if num_pools < 1 or num_microbatches < 1 or len(amounts) % bins:
        raise PlanError(
            f"{len(amounts)} sequences cannot be dealt evenly to {num_pools} pools × {num_microbatches} microbatches: their "
            "number must be a multiple of that product"
        )
    slots = len(amounts) // bins
    heap = [(0.0, index, 0) for index in range(bins)]
    dealt = np.zeros(len(amounts), np.int64)
    for sequence in np.argsort(-amounts, kind="stable").tolist():
        load, index, used = heapq.heappop(heap)
        dealt[sequence] = index
        if used + 1 < slots:
            heapq.heappush(heap, (load + float(amounts[sequence]), index, used + 1))
    return dealt
