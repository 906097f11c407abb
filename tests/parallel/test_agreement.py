"""Ring 0: the notice board of a group whose store does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from distattn.errors import TransportError
from distattn.parallel import agreement
from distattn.parallel.agreement import Board
from tests.faults.frozen_store import locked


def test_a_store_that_does_not_answer_ends_a_plan_call_and_says_nothing_to_those_who_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    theirs = Board(store.clone(), 1, 2)  # pyright: ignore[reportAttributeAccessIssue]
    theirs.post_notice("transport", "call 7", "rank 1 refused its input")
    monkeypatch.setattr(agreement, "_LOOK_S", 0.2)
    monkeypatch.setattr(agreement, "_PLAN_S", 0.4)
    ours = Board(store, 0, 2)
    with locked(tmp_path / "store"):
        ours.check()
        assert not ours.someone_gave_up()
        with pytest.raises(TransportError, match=r"rank 0 could not compare plan call 0 with the others' \(the ranks' store"):
            ours.agree("ring")
        assert "the others cannot be asked (the ranks' store did not answer within 0.2 s" in ours.report_wait("for rank 1", 1.0)
        ours.post_notice("transport", "call 8", "rank 0 refused its input")
    monkeypatch.undo()
    with pytest.raises(TransportError, match="rank 1 refused its input"):
        Board(store, 0, 2).check()
