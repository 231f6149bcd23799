"""Accelerated models, and sharded parts of our own, in two processes on gloo give the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
MODES = ("all_reduce", "ddp", "accelerate after ddp", "fsdp2 whole", "fsdp2 blocks")
OWN_PARTS = ("whole", "network", "block", "MLP", "weight", "heads", "MLP, network, whole")


@pytest.mark.breadth
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo")
def test_two_processes_have_the_gradients_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "accelerate_worker.py"], cwd=HERE, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    expected = {f"same gradients: {name}, {mode}" for name in ("trm", "hrm", "urm") for mode in MODES}
    expected |= {f"same gradients: trmfast.TRM, {part}" for part in OWN_PARTS}
    assert set(run.stdout.splitlines()) >= expected
