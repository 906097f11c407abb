"""Where the pieces of packed documents lie, and which of them continue one another: the chains that states travel along."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distattn.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Chains:
    """Links in the order in which a state passes them.

    ptr: int64 [C+1]; chain c passes ``links[ptr[c]:ptr[c+1]]``, two at least. rank_of: int64, rank of each link by its number.
    Nothing enters a chain's first link, and nobody asks what leaves its last. A link may end one chain and begin another.
    """

    num_ranks: int
    ptr: np.ndarray
    links: np.ndarray
    rank_of: np.ndarray

    def reversed(self) -> Chains:
        """The way of gradients."""
        position = np.arange(len(self.links))
        chain = self.chain_of
        return Chains(self.num_ranks, self.ptr, self.links[self.ptr[chain] + self.ptr[chain + 1] - 1 - position], self.rank_of)

    @cached_property
    def chain_of(self) -> np.ndarray:
        """Chain of each entry of ``links``."""
        return np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))

    @cached_property
    def first(self) -> np.ndarray:
        """Whether each entry is its chain's first, bool."""
        first = np.zeros(len(self.links), bool)
        first[self.ptr[:-1]] = True
        return first

    @cached_property
    def last(self) -> np.ndarray:
        last = np.zeros(len(self.links), bool)
        last[self.ptr[1:] - 1] = True
        return last

    @property
    def longest(self) -> int:
        """Links of the longest chain, 0 without any."""
        return int(np.diff(self.ptr).max(initial=0))


@dataclass(frozen=True, eq=False)
class Stream:
    """All pieces of all ranks, in the order of the packed stream; a piece's number is also its number as a link.

    bounds: int64 [N, 2], global rows of each piece. rank, document: of each piece. place: its index among its rank's pieces, in
    storage order. documents: cu_seqlens, int64 [D+1].
    """

    num_ranks: int
    documents: np.ndarray
    bounds: np.ndarray
    rank: np.ndarray
    document: np.ndarray
    place: np.ndarray

    @cached_property
    def starts_document(self) -> np.ndarray:
        return self.bounds[:, 0] == self.documents[self.document]

    @cached_property
    def ends_document(self) -> np.ndarray:
        return self.bounds[:, 1] == self.documents[self.document + 1]

    @cached_property
    def chains(self) -> Chains:
        """One chain for each document that lies in several pieces."""
        return self._chains(self.starts_document)

    def halo_chains(self, width: int) -> Chains:
        """Chains of the last ``width`` rows before each piece: one that is longer than that passes nothing on."""
        cut = self.starts_document | (self.bounds[:, 1] - self.bounds[:, 0] >= width)
        return self._chains(cut)

    def of_rank(self, rank: int) -> np.ndarray:
        """Numbers of a rank's pieces, in storage order."""
        mine = np.flatnonzero(self.rank == rank)
        return mine[np.argsort(self.place[mine])]

    def _chains(self, resets: np.ndarray) -> Chains:
        """Runs of pieces from each reset to the next one of its document, that one included; shorter than two are dropped."""
        begins = np.flatnonzero(resets)
        after = np.concatenate([begins[1:], [len(self.rank)]])
        inside = after < len(self.rank)
        continues = np.zeros(len(begins), bool)
        continues[inside] = self.document[after[inside]] == self.document[begins[inside]]
        length = after - begins + continues
        begins, length = begins[length >= 2], length[length >= 2]
        ptr = np.concatenate([[0], np.cumsum(length)])
        links = np.repeat(begins - ptr[:-1], length) + np.arange(ptr[-1])
        return Chains(self.num_ranks, ptr, links, self.rank)


@dataclass(frozen=True, eq=False)
class OwnPieces:
    """The pieces of one rank, numbered from 0 in storage order."""

    stream: Stream
    rank: int

    @cached_property
    def numbers(self) -> np.ndarray:
        """Number of each in the stream."""
        return self.stream.of_rank(self.rank)

    @cached_property
    def rows(self) -> np.ndarray:
        """First local row of each, and one past its last: int64 [n, 2]."""
        lengths = self.stream.bounds[self.numbers, 1] - self.stream.bounds[self.numbers, 0]
        ends = np.cumsum(lengths)
        return np.stack([ends - lengths, ends], 1)

    @cached_property
    def late(self) -> list[int]:
        """Those that a state enters: they do not begin their document."""
        return np.flatnonzero(~self.stream.starts_document[self.numbers]).tolist()

    @cached_property
    def emit(self) -> list[int]:
        """Those that a state leaves: they do not end their document."""
        return np.flatnonzero(~self.stream.ends_document[self.numbers]).tolist()


def cut_stream(layout: Layout, cu_seqlens: np.ndarray) -> Stream:
    """The pieces of every rank: runs of rows that follow one another in storage, cut at document starts."""
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    ranges, owner = layout.ranges[order], layout.range_owner[order]
    joined = np.zeros(len(order), bool)
    joined[1:] = (order[1:] == order[:-1] + 1) & (owner[1:] == owner[:-1])
    starts = np.unique(np.concatenate([ranges[~joined, 0], cu_seqlens[:-1]]))
    starts = starts[starts < layout.num_rows]
    bounds = np.stack([starts, np.concatenate([starts[1:], [layout.num_rows]])[: len(starts)]], 1)
    within = np.searchsorted(ranges[:, 0], starts, side="right") - 1
    rank = owner[within]
    document = np.searchsorted(cu_seqlens, starts, side="right") - 1
    place = np.zeros(len(starts), np.int64)
    stored = np.lexsort((starts, order[within], rank))
    first = np.searchsorted(rank[stored], np.arange(layout.num_ranks))
    place[stored] = np.arange(len(starts)) - first[rank[stored]]
    return Stream(layout.num_ranks, cu_seqlens, bounds, rank, document, place)
