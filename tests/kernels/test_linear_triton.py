"""The Triton kernels of linear attention in Triton's interpreter, against the token loop in fp64; and their refusals.

The interpreter is chosen where Triton is imported, so that kernels run in a process of their own, which this file starts.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import pytest
import torch

from distattn.errors import UnsupportedError
from distattn.kernels.linear import LinearCase, Operands, Pieces, choose_linear_backend, triton_spans
from distattn.kernels.linear.chunked import TorchLinear
from distattn.kernels.linear.triton_backend import TritonLinear
from distattn.kernels.linear.triton_configs import LinearConfigs, linear_configs, padded
from tests.kernels.linear_cases import (
    CASES,
    NAMES,
    make_operands,
    oracle,
    random_gradient,
    random_states,
    run_pieces,
    run_whole,
    worst,
)

every_case = pytest.mark.parametrize(("kind", "gate"), [pytest.param(*case, id=" ".join(case)) for case in CASES])
CPU = LinearCase("cpu", torch.float32, "scalar", False, 64, 64, 2, 2)


def whole_errors(
    kind: str, gate: str, lengths: list[int], options: dict, *, spread: bool = False, span_chunks: int = 0
) -> dict[str, float]:
    """In the interpreter's process, of documents with initial and final states. spread: inputs with gaps between features.
    span_chunks: nobody asks for the gradient of the gate, and there are walks by spans of that length."""
    x = make_operands(kind, gate, 1, sum(lengths), **options)._replace(with_dg=not span_chunks)
    configs = linear_configs(x.q.dtype, gate, x.beta is not None, x.q.shape[-1], x.v.shape[-1])
    if spread:
        given = {name: t for name in NAMES if (t := getattr(x, name)) is not None}
        x = x._replace(**{name: torch.stack((t, t * np.nan), -1)[..., 0] for name, t in given.items()})
    initial, dfinal = (random_states(1, len(lengths), x, seed).float() for seed in (1, 2))
    do = random_gradient(x)
    with np.errstate(all="ignore"):
        found = run_whole(TritonLinear(replace(configs, span_chunks=span_chunks)), x, lengths, initial, do, dfinal)
    return worst(found, {n: t for n, t in oracle(x, lengths, initial, do, dfinal).items() if n != "dg" or x.with_dg})


def piece_errors(kind: str, gate: str) -> dict[str, float]:
    """In the interpreter's process."""
    x = make_operands(kind, gate, 1, 139, strength=0.05, heads=1, key_dim=16, value_dim=16, dtype=torch.float32)
    with np.errstate(all="ignore"):
        return worst(*run_pieces(TritonLinear(), x, [70, 5, 64]))


SETS = {
    "ends, whole, begins": ([66, 5, 130], [1, 2], [0], [2], [0, 1]),
    "through": ([130], [], [0], [0], []),
    "ends": ([130], [], [0], [], [0]),
    "two chains": ([3, 66, 129, 1], [], [1, 2], [0, 2], [3]),
    "whole": ([330, 5, 129], [0, 2], [], [], [0, 1]),
}
"""Pieces of one rank: their lengths, and which start from initial states, are late, emit, and are final."""


def sets_errors(
    kind: str,
    gate: str,
    sets: tuple[list[int], ...],
    num_parts: int = 0,
    span_chunks: int = 0,
    with_dg: bool = True,
    keep: bool = True,
    fused: bool = True,
) -> dict[str, float]:
    """In the interpreter's process: against plain torch in fp64, from random states that arrive. keep: the backward is given
    what the forward kept."""
    lengths, *members = sets
    enter, late, emit, final = (np.array(m, np.int64) for m in members)
    pieces = Pieces(np.array(lengths), enter, late, emit, final)
    options = {"heads": 1, "value_heads": 1, "key_dim": 16, "value_dim": 16, "dtype": torch.float32}
    x = make_operands(kind, gate, 2, sum(lengths), strength=2.0 if gate == "scalar" else 0.3, **options)
    x = x._replace(with_dg=with_dg)
    configs = replace(linear_configs(torch.float32, gate, x.beta is not None, 16, 16), span_chunks=span_chunks)
    counts = [len(m) for m in members]
    states = {
        name: random_states(2, n, x, i).float()
        for i, (name, n) in enumerate(zip(("enter", "late", "emit", "final"), counts, strict=True))
    }
    do = random_gradient(x)
    found, wanted = {}, {}
    exact = Operands(*(None if t is None else t.double() for t in x[:5]), x.scale, with_dg)  # pyright: ignore[reportCallIssue]
    for backend, inputs, results in ((TritonLinear(configs, num_parts, fused=fused), x, found), (TorchLinear(), exact, wanted)):
        given = {name: state.to(inputs.v.dtype) for name, state in states.items()}
        with np.errstate(all="ignore"):
            forward = backend.forward_begin(inputs, pieces, given["enter"])
            results |= {"emitted": forward.emitted.clone(), "transition": forward.transition}
            forward.intra()
            results["o"], results["final"] = forward.finish(given["late"])
            assert len(forward.kept) == backend.num_kept(inputs, pieces)
            backward = backend.backward_begin(
                inputs, pieces, given["enter"], given["late"], do.to(inputs.v), given["final"], forward.kept if keep else None
            )
            results["demitted"] = backward.emitted.clone()
            backward.intra()
            results |= {f"grad {name}": value for name, value in backward.finish(given["emit"])._asdict().items()}
    return worst(found, {name: value for name, value in wanted.items() if value is not None})


@every_case
def test_whole_documents(kind: str, gate: str, interpreter: Executor) -> None:
    options = {"heads": 1, "value_heads": 2, "key_dim": 20, "value_dim": 24, "dtype": torch.float32, "strength": 0.1}
    errors = interpreter.submit(whole_errors, kind, gate, [65, 1, 64], options).result()
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize(
    ("kind", "gate"), [("gla", "vector"), ("kda", "vector"), ("gated_delta", "scalar"), ("lightning", "constant")]
)
def test_strong_gates(kind: str, gate: str, interpreter: Executor) -> None:
    """Chunks that decay by far more than fp32 spans: differences alone are exponentiated.

    The gradient of a constant gate, 0.6 as a sum of 239 in absolute values, is off by 1.0e-4 by rounding alone.
    """
    options = {"heads": 1, "value_heads": 1, "key_dim": 16, "value_dim": 16, "dtype": torch.float32, "strength": 20.0}
    errors = interpreter.submit(whole_errors, kind, gate, [70], options).result()
    assert errors.pop("dg") < (2e-4 if gate == "constant" else 1e-4)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("kind", "gate", "num_parts"),
    [("gated_delta", "scalar", 3), ("kda", "vector", 2), ("delta", "none", 1), ("simple_gla", "scalar", 1)],
)
def test_pieces_of_every_sort(kind: str, gate: str, num_parts: int, name: str, interpreter: Executor) -> None:
    errors = interpreter.submit(sets_errors, kind, gate, SETS[name], num_parts).result()
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("kind", "gate", "span_chunks"), [("lightning", "constant", 1), ("linear", "none", 1), ("simple_gla", "scalar", 2)]
)
def test_walks_by_spans(kind: str, gate: str, span_chunks: int, name: str, interpreter: Executor) -> None:
    """Pieces of every sort, of one span and of several, where nobody asks for the gradient of the gate."""
    options = {"span_chunks": span_chunks, "with_dg": False}
    errors = interpreter.submit(sets_errors, kind, gate, SETS[name], **options).result()
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize("sets", [([330, 395], [1], [0], [1], [0]), ([330, 395], [1], [], [], [0])])
@pytest.mark.parametrize(("kind", "gate"), [("lightning", "constant"), ("linear", "none"), ("simple_gla", "scalar")])
def test_walks_through_many_spans(kind: str, gate: str, sets: tuple[list[int], ...], interpreter: Executor) -> None:
    """More than are loaded at once."""
    errors = interpreter.submit(sets_errors, kind, gate, sets, span_chunks=1, with_dg=False).result()
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize(("kind", "gate"), [("lightning", "constant"), ("linear", "none"), ("simple_gla", "scalar")])
def test_walks_of_whole_documents_kernel_by_kernel(kind: str, gate: str, interpreter: Executor) -> None:
    """As where the device has no room for all programs at once."""
    options = {"span_chunks": 1, "with_dg": False, "fused": False}
    errors = interpreter.submit(sets_errors, kind, gate, SETS["whole"], **options).result()
    assert max(errors.values()) < 3e-5, errors


def passes_of(late: bool, key_dim: int, *, keep: bool = True, fused: bool = True) -> list[str]:
    """In the interpreter's process: the classes of the passes of two documents, into whose first a state crosses, or none."""
    x = make_operands("lightning", "constant", 1, 400, heads=1, value_heads=1, key_dim=key_dim, value_dim=64)
    x, none, first = x._replace(with_dg=False), np.zeros(0, np.int64), np.zeros(1, np.int64)
    configs = replace(linear_configs(x.q.dtype, "constant", False, key_dim, 64), span_chunks=2)
    pieces = Pieces(np.array([330, 70]), none, first if late else none, none, none)
    backend, nothing, arrived = TritonLinear(configs, fused=fused), random_states(1, 0, x, 1), random_states(1, int(late), x, 1)
    with np.errstate(all="ignore"):
        forward = backend.forward_begin(x, pieces, nothing)
        kept = forward.kept if keep else None
        backward = backend.backward_begin(x, pieces, nothing, arrived.float(), torch.zeros_like(x.v), nothing, kept)
    return [type(forward).__name__, type(backward).__name__]


def test_one_launch_where_no_state_crosses(interpreter: Executor) -> None:
    """And where blocks of K and of V are as many, and the backward knows what the forward kept."""
    assert interpreter.submit(passes_of, False, 64).result() == ["FusedForward", "FusedBackward"]
    assert interpreter.submit(passes_of, False, 64, keep=False).result() == ["FusedForward", "WalkBackward"]
    assert interpreter.submit(passes_of, True, 64).result() == ["WalkForward", "WalkBackward"]
    assert interpreter.submit(passes_of, False, 32).result() == ["WalkForward", "WalkBackward"]
    assert interpreter.submit(passes_of, False, 64, fused=False).result() == ["WalkForward", "WalkBackward"]


def test_one_launch_needs_room_for_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of 132 multiprocessors: 264 programs, and 132 that meet."""
    monkeypatch.setattr(triton_spans, "num_multiprocessors", lambda _: 132)
    configs = linear_configs(torch.bfloat16, "none", False, 128, 128)

    def fits(rows: list[int], heads: int, span_chunks: int = 0) -> bool:
        x = make_operands("linear", "none", 1, sum(rows), heads=1, value_heads=heads, key_dim=128, value_dim=128)
        x = x._replace(**{name: getattr(x, name).to("meta") for name in ("q", "k", "v")})
        pieces, chosen = Pieces.whole(rows), replace(configs, span_chunks=span_chunks)
        spans = triton_spans.spans_for(x, pieces, chosen)
        assert spans is not None
        return triton_spans.fits_at_once(x, pieces, spans, chosen)

    assert fits([8192], 16)
    assert fits([4096, 4096], 16)
    assert not fits([8192], 16, span_chunks=8)  # 512 programs
    assert fits([8192], 1, span_chunks=2)  # 128 that meet
    assert not fits([8320], 1, span_chunks=1)  # 260
    assert not fits([1024] * 8, 32)


@pytest.mark.parametrize(("kind", "gate", "span_chunks"), [("lightning", "constant", 2), ("linear", "none", 1)])
def test_walks_that_make_again_what_the_forward_kept(kind: str, gate: str, span_chunks: int, interpreter: Executor) -> None:
    options = {"span_chunks": span_chunks, "with_dg": False, "keep": False}
    errors = interpreter.submit(sets_errors, kind, gate, SETS["ends, whole, begins"], **options).result()
    assert max(errors.values()) < 3e-5, errors


def test_lengths_of_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of programs for one document; short spans for documents that end at different times."""
    monkeypatch.setattr(triton_spans, "num_multiprocessors", lambda _: 132)

    def longest(rows: list[int], heads: int) -> int:
        x = make_operands("linear", "none", 1, sum(rows), heads=1, value_heads=heads, key_dim=2, value_dim=2)
        spans = triton_spans.spans_for(x, Pieces.whole(rows), linear_configs(torch.bfloat16, "none", False, 128, 128))
        assert spans is not None
        assert spans.pieces.num_rows == sum(rows)
        return int(spans.pieces.lengths.max())

    assert longest([8192], 32) == 1024  # 8 spans for each of 32 heads: 256 programs, and 264 have room
    assert longest([16384], 32) == 2048
    assert longest([8192, 8192], 32) == 2048
    assert longest([9000, 4000, 3384], 32) == 704
    assert longest([16384], 100) == 3328  # two programs a head leave a quarter idle, five in two rounds a twentieth
    assert triton_spans.span_counts(300, 264) == [3]
    assert triton_spans.span_counts(2000, 264) == [1]


def test_spans_are_chosen_once_for_a_shape() -> None:
    pieces, configs = Pieces.whole([8192]), linear_configs(torch.bfloat16, "none", False, 128, 128)

    def chosen(heads: int, configs: LinearConfigs = configs) -> triton_spans.Spans | None:
        x = make_operands("linear", "none", 1, 8192, heads=1, value_heads=heads, key_dim=2, value_dim=128)
        return triton_spans.spans_for(x, pieces, configs)

    first = chosen(1)
    assert first is not None
    assert chosen(1) is first
    shorter = chosen(1, replace(configs, span_chunks=2))
    assert shorter is not None
    assert len(shorter.piece) == 64
    assert chosen(1) is first


def test_what_the_forward_keeps() -> None:
    """What enters each span, where that is at most a quarter of q, k and v; or the running sums of a gate a row."""
    x = make_operands("lightning", "constant", 2, 4096, heads=1, value_heads=2, key_dim=64, value_dim=64, dtype=torch.float16)
    configs = replace(linear_configs(torch.float16, "constant", False, 64, 64), span_chunks=8)
    backend = TritonLinear(configs)
    assert backend.num_kept(x, Pieces.whole([4096])) == 2 * 2 * 8 * (64 * 64 + 1)
    assert TritonLinear(replace(configs, span_chunks=1)).num_kept(x, Pieces.whole([4096])) == 0
    assert backend.num_kept(x, Pieces.whole([64] * 64)) == 0
    scalar = make_operands("simple_gla", "scalar", 1, 4096, heads=1, value_heads=1, key_dim=64, value_dim=64)
    assert backend.num_kept(scalar, Pieces.whole([4096])) == 4096
    delta = make_operands("delta", "none", 1, 4096, heads=1, value_heads=1, key_dim=64, value_dim=64)
    assert backend.num_kept(delta, Pieces.whole([4096])) == 0
    assert TorchLinear().num_kept(x, Pieces.whole([4096])) == 0


@pytest.mark.parametrize(
    ("kind", "gate", "dtype", "limit"),
    [
        ("retention", "constant", torch.float32, 1e-5),
        ("linear", "none", torch.float16, 1e-2),
        ("simple_gla", "scalar", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("dims", [(20, 40), (40, 44), (17, 20)])
def test_walks_of_grouped_heads_and_odd_dims(
    kind: str, gate: str, dtype: torch.dtype, limit: float, dims: tuple[int, int], interpreter: Executor
) -> None:
    """The last two in one launch, of two blocks of columns and of one."""
    options = {"heads": 1, "value_heads": 2, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype, "strength": 0.1}
    errors = interpreter.submit(whole_errors, kind, gate, [130, 1, 66], options, spread=True, span_chunks=1).result()
    assert "dk" in errors
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize(("kind", "gate"), [("gated_delta", "scalar"), ("kda", "vector")])
def test_transitions_that_fade(kind: str, gate: str, interpreter: Executor) -> None:
    """Of a piece of six chunks nothing is left after four, where the kernel looks."""
    errors = interpreter.submit(sets_errors, kind, gate, ([330], [], [0], [0], []), 1).result()
    assert max(errors.values()) < 3e-5, errors


def without_dg(kind: str, gate: str) -> list[str]:
    """In the interpreter's process: which gradients change where nobody asks for the gate's."""
    x = make_operands(kind, gate, 1, 70, strength=0.1, heads=1, value_heads=1, key_dim=16, value_dim=16, dtype=torch.float32)
    initial, dfinal, do = random_states(1, 1, x, 1).float(), random_states(1, 1, x, 2).float(), random_gradient(x)
    with np.errstate(all="ignore"):
        every, some = (
            run_whole(TritonLinear(), x._replace(with_dg=with_dg), [70], initial, do, dfinal) for with_dg in (True, False)
        )
    assert every["dg"] is not None
    return [name for name, value in every.items() if value is not None and (some[name] is None or (some[name] != value).any())]


@pytest.mark.parametrize(("kind", "gate"), [("gla", "vector"), ("gated_delta", "scalar")])
def test_gates_without_a_gradient(kind: str, gate: str, interpreter: Executor) -> None:
    assert interpreter.submit(without_dg, kind, gate).result() == ["dg"]


@every_case
def test_pieces(kind: str, gate: str, interpreter: Executor) -> None:
    errors = interpreter.submit(piece_errors, kind, gate).result()
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize(
    ("kind", "gate", "dtype", "dims", "limit"),
    [
        ("gated_delta", "scalar", torch.float16, (16, 40), 1e-2),
        ("kda", "vector", torch.float16, (40, 16), 1e-2),
        ("gla", "vector", torch.float32, (20, 16), 5e-6),
        ("kda", "vector", torch.float32, (16, 24), 1e-5),
        ("simple_gla", "scalar", torch.float32, (70, 16), 5e-6),
        ("delta", "none", torch.float32, (16, 130), 5e-6),
    ],
)
def test_dtypes_and_odd_dims_of_strided_inputs(
    kind: str, gate: str, dtype: torch.dtype, dims: tuple[int, int], limit: float, interpreter: Executor
) -> None:
    options = {"heads": 1, "value_heads": 1, "key_dim": dims[0], "value_dim": dims[1], "dtype": dtype, "strength": 0.1}
    errors = interpreter.submit(whole_errors, kind, gate, [20, 66], options, spread=True).result()
    assert max(errors.values()) < limit, errors


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = TritonLinear()
    assert "TRITON_INTERPRET=1" in str(backend.why_not(CPU))
    assert "fp32, not torch.float64" in str(backend.why_not(replace(CPU, dtype=torch.float64)))
    assert "up to 256, not 257" in str(backend.why_not(replace(CPU, key_dim=257)))
    with pytest.raises(UnsupportedError, match="kernel=triton cannot compute this: runs on cpu only in Triton's interpreter"):
        choose_linear_backend(CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not(CPU) is None
    assert "no bf16" in str(backend.why_not(replace(CPU, dtype=torch.bfloat16)))
    chosen, why = choose_linear_backend(CPU)
    assert chosen.name == "torch"
    assert why == "first of torch, triton that can"


def test_more_documents_than_a_grid_has_room_for() -> None:
    """One walk for each document, batch entry and value head, along an axis of 65,535 programs."""
    pytest.importorskip("triton", reason="triton is not installed")
    x = make_operands("linear", "none", 2, 8192, heads=1, value_heads=4, key_dim=1, value_dim=1, dtype=torch.float32)
    with pytest.raises(
        UnsupportedError, match=r"8192 pieces .* make 65536 walks, .* at most 65535 a call: .* kernel=\"torch\""
    ):
        TritonLinear().forward_begin(x, Pieces.whole([1] * 8192), random_states(2, 0, x, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "vector"])
def test_blocks_are_powers_of_two(gate: str, dtype: torch.dtype) -> None:
    for delta in (False, True):
        for key_dim, value_dim in ((16, 16), (60, 100), (128, 256), (256, 512)):
            launches = vars(linear_configs(dtype, gate, delta, key_dim, value_dim))
            for launch in (x for name, x in launches.items() if name != "span_chunks"):
                assert padded(launch.block_k) == launch.block_k
                assert padded(launch.block_v) == launch.block_v
