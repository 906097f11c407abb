"""Checkpoints over gloo: sharding, restarts on other numbers of ranks, agreement. One start of 3 ranks for all cases."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from distattn.errors import CheckpointError
from distattn.testing import run_ranks
from distattn.training import checkpoint as checkpoint_module
from distattn.training.checkpoint import CheckpointManager, CheckpointReader, published_steps


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "rows": torch.randn(7, 4, generator=generator),
        "one row": torch.randn(1, 4, generator=generator),
        "columns": torch.randn(3, 5, generator=generator).bfloat16(),
        "copy": torch.randn(6, generator=generator),
        "scalar": torch.tensor(2.5),
        "plain": torch.randn(2, 2, generator=generator),
    }


DIMS: dict[str, int | None] = {"rows": 0, "one row": 0, "columns": 1, "copy": None, "scalar": None}


def on_mesh(values: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Sharded unevenly (3 ranks of a length of 1, 5 and 7 hold different amounts, or none)."""
    placed: dict[str, Tensor] = {}
    for name, value in values.items():
        if name == "plain":
            placed[name] = value.clone()
        else:
            dim = DIMS[name]
            placed[name] = distribute_tensor(value.clone(), mesh, [Replicate() if dim is None else Shard(dim)])
    return placed


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def chain(rank: int, root: Path) -> None:
    """1 → 2 → 3 → 2 ranks: each loads what the one before saved, and saves it again."""
    values = whole()
    for step, size in enumerate((1, 2, 3, 2), start=1):
        group, mesh = dist.new_group(list(range(size))), None
        if rank < size:
            assert isinstance(group, dist.ProcessGroup)
            mesh = DeviceMesh.from_group(group, "cpu")
            manager = CheckpointManager(root / "chain", rank=rank, world=size, group=group)
            target = on_mesh(values if step == 1 else blank(values), mesh)
            restored = manager.load(target)
            assert (restored is None) == (step == 1)
            assert restored is None or (restored.step, restored.meta) == (step - 1, {"size": step - 1})
            assert same(gathered(target), values), f"{size} ranks"
            manager.save(step, target, {"size": size})
            manager.close()
            assert step in published_steps(manager.directory), "close waits for the publication on every rank"
        dist.barrier()


def fsdp(rank: int, root: Path) -> None:
    """fully_shard's uneven shards, with AdamW's state."""

    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
        fully_shard(model, mesh=DeviceMesh("cpu", [0, 1, 2]))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        return model, optimizer

    def state(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        for name, parameter in list(tensors.items()):
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        return tensors

    first, second = state(*build(1)), state(*build(2))
    manager = CheckpointManager(root / "fsdp", rank=rank, world=3)
    manager.save(1, first, {})
    assert manager.load(second) is not None
    for name in first:
        assert torch.equal(*(gathered({"x": t[name].detach()})["x"] for t in (first, second))), name
    manager.close()


def copies_are_written_once(rank: int, root: Path) -> None:
    reader = CheckpointReader(root / "chain" / "step-3")
    numels = {name: sum(stored.block.numel for stored in blocks) for name, blocks in reader._stored.items()}
    assert numels == {name: value.numel() for name, value in whole().items()}
    assert same({name: reader.read(name) for name in reader.tensors}, whole())


def ranks_outside_the_mesh(rank: int, root: Path) -> None:
    """Two of three ranks hold a tensor: the third writes and reads nothing of it."""
    mesh = DeviceMesh("cpu", [0, 1])

    def tensors(value: float) -> dict[str, Tensor]:
        sharded = DTensor.from_local(torch.full((2, 2), value), mesh, [Shard(0)], run_check=False)
        scalar = DTensor.from_local(torch.tensor(8.0 if value >= 0 else value), mesh, [Replicate()], run_check=False)
        return {"sharded": sharded, "scalar": scalar}

    manager = CheckpointManager(root / "part", rank=rank, world=3)
    manager.save(1, tensors(float(rank)), {})
    manager.wait()
    reader = CheckpointReader(root / "part" / "step-1")
    assert torch.equal(reader.read("sharded")[:, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert reader.read("scalar") == 8
    target = tensors(-1.0)
    assert manager.load(target) is not None
    if rank < 2:
        assert isinstance(target["sharded"], DTensor)
        assert (target["sharded"].to_local() == rank).all()


def all_agree(rank: int, root: Path) -> None:
    """Only one rank checks the damaged file, and all take the older checkpoint."""
    mesh = DeviceMesh("cpu", [0, 1, 2])
    manager = CheckpointManager(root / "agree", rank=rank, world=3)
    for step in (1, 2):
        manager.save(step, on_mesh({name: value + step for name, value in whole().items()}, mesh), {})
    manager.close()
    if rank == 0:
        flip(root / "agree" / "step-2" / "shard-00001-of-00003.safetensors")
    dist.barrier()
    target = on_mesh(blank(whole()), mesh)
    restored = manager.load(target)
    assert restored is not None
    assert restored.step == 1
    assert len(restored.skipped) == 1
    assert "shard-00001-of-00003.safetensors is damaged" in restored.skipped[0]
    assert same(gathered(target), {name: value + 1 for name, value in whole().items()})


def failures_reach_every_rank(rank: int, root: Path) -> None:
    mesh = DeviceMesh("cpu", [0, 1, 2])
    manager = CheckpointManager(root / "fail", rank=rank, world=3, timeout_s=1.0)
    manager.save(1, on_mesh(whole(), mesh), {})
    manager.wait()
    real = checkpoint_module.write_shard
    if rank == 2:

        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint_module.write_shard = full
    manager.save(2, on_mesh(whole(), mesh), {})
    with pytest.raises(CheckpointError, match="step 2 was not written: rank 2: no space is left"):
        manager.wait()
    released = threading.Event()
    if rank == 1:

        def late(*arguments: Any) -> Any:
            released.wait(30)
            return real(*arguments)

        checkpoint_module.write_shard = late
    if rank == 2:
        checkpoint_module.write_shard = real
    manager.save(3, on_mesh(whole(), mesh), {})
    if rank != 1:
        with pytest.raises(CheckpointError, match=r"did not finish within 1 seconds: rank 1\."):
            manager.wait()
    dist.barrier()
    released.set()
    if rank == 1:
        with pytest.raises(CheckpointError, match="did not finish within 1 seconds"):
            manager.wait()
    checkpoint_module.write_shard = real
    manager.save(4, on_mesh(whole(), mesh), {})
    manager.close()
    assert published_steps(root / "fail") == [1, 4]


def disagreements_are_errors(rank: int, root: Path) -> None:
    mesh = DeviceMesh("cpu", [0, 1, 2])
    manager = CheckpointManager(root / "disagree", rank=rank, world=3)
    with pytest.raises(CheckpointError, match=r"ranks \[2\] save another step or other tensors than rank 0"):
        manager.save(5 + rank // 2, on_mesh(whole(), mesh), {})
    with pytest.raises(CheckpointError, match=r"ranks \[1, 2\] save another step"):
        manager.save(5, {f"name {min(rank, 1)}": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match=r"w has placement .*redistribute"):
        manager.save(5, {"w": DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)}, {})
    with pytest.raises(CheckpointError, match="process group says rank"):
        CheckpointManager(root / "disagree", rank=rank, world=2)


def several_ranks(rank: int, world: int, root: Path) -> None:
    assert world == 3
    cases = (
        chain,
        fsdp,
        copies_are_written_once,
        ranks_outside_the_mesh,
        all_agree,
        failures_reach_every_rank,
        disagreements_are_errors,
    )
    for case in cases:
        case(rank, root)
        dist.barrier()


def test_several_ranks(tmp_path: Path) -> None:
    run_ranks(several_ranks, 3, tmp_path, timeout_s=240)
