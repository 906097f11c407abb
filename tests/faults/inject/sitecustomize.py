"""Faults for ranks that tests start: Python runs this first where the folder is on PYTHONPATH.

DISTATTN_TEST_PACE: seconds that every step takes longer, so that a test can act between two of them.
DISTATTN_TEST_STALL: RANK:STEP:FILE: that rank stops for good in that step, once: FILE, made then, is what remembers it.
"""

import os
import time


def _install() -> None:
    from distattn.models import attention as softmax_layer
    from distattn.training.trainer import Trainer

    pace = float(os.environ.get("DISTATTN_TEST_PACE", "0"))
    rank, stall_step, marker = (os.environ.get("DISTATTN_TEST_STALL", "") + "::").split(":")[:3]
    real_step, real_attention = Trainer._train_step, softmax_layer.attention
    reached = []

    def train_step(self, step):
        time.sleep(pace)
        if rank == os.environ["RANK"] and int(stall_step) == step and not os.path.exists(marker):
            reached.append(step)
        return real_step(self, step)

    def attention(*arguments, **options):
        if reached:  # here the other ranks already wait for this one's keys and values
            open(marker, "w").close()
            stall_for_good()
        return real_attention(*arguments, **options)

    Trainer._train_step, softmax_layer.attention = train_step, attention


def stall_for_good() -> None:
    """What the stacks must show."""
    time.sleep(3600)


if os.environ.get("RANK") and "DISTATTN_TEST_PACE" in os.environ:
    _install()
