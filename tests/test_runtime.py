"""trmfast.runtime: no PyTorch, the file of trmfast.save, the same engine and the same solving loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trmfast
from model_cases import TINY, make_batch
from test_solver import MODELS, key, model_of
from trmfast import runtime
from trmfast.models import URM, ACTLossHead, ACTModel
from trmfast.runtime.arrays import narrow, widen
from trmfast.solving import Confident, Evaluator, Never, Solver, Unchanged
from trmfast.targets import extension

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(extension is None, reason="no CPU engine, on which the runtime computes"),
]


def saved(model: ACTModel, folder: Path) -> Path:
    path = folder / "model.safetensors"
    trmfast.save(model, path)
    return path


def urm(dtype: str) -> URM:
    torch.manual_seed(0)
    model = URM(TINY | {"forward_dtype": dtype, "halt_max_steps": 8, "puzzle_emb_len": 1})
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.6)
        model.inner.q_head.bias.fill_(-0.5)  # type: ignore[union-attr]
        model.puzzle_emb.weights.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", [*MODELS, "hrm-mlp_t", "urm"])
def test_a_step_is_that_of_the_torch_model(name: str, dtype: str, tmp_path: Path) -> None:
    given = "bfloat16" if dtype == "int8" else dtype
    model = urm(given) if name == "urm" else model_of(name, forward_dtype=given)
    ours = runtime.load(saved(model, tmp_path), "int8" if dtype == "int8" else None, threads=1)
    assert isinstance(ours, Evaluator)
    assert (ours.seq_len, ours.vocab_size, ours.halt_max_steps, ours.dtype) == (6, 7, 8, dtype)
    batch = make_batch(3, rows=5)
    inner: Any = model.inner
    inner.product_dtype = "int8" if dtype == "int8" else None
    if ours.tables is not None:
        # The last bit of a cosine is the library's; from the same tables on, everything is the same.
        theirs = [table.numpy() for table in inner.rotary_emb()]
        for mine, table in zip(ours.tables, theirs, strict=True):
            np.testing.assert_allclose(mine, table, rtol=0, atol=2e-6)
        ours.tables = (theirs[0], theirs[1])
    rows = ours.new_batch()
    rows.update([], batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy())
    x = inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"] if ours.num_identifiers else None)
    np.testing.assert_array_equal(widen(rows.x), x.detach().float().numpy())
    with torch.inference_mode():
        carry = inner.reset_carry(torch.ones(5, dtype=torch.bool), inner.empty_carry(5))
        carry, logits, (q_halt, q_continue) = inner(carry, batch)
    step = rows.step(None)
    for mine, state in zip(rows.states, inner._states(carry), strict=True):
        np.testing.assert_array_equal(widen(mine), state.float().numpy())
    # Products are added up in another order; in bfloat16 that may round a logit to its neighbour.
    bound = 1e-6 if dtype == "float32" else 2**-8
    mine_logits, q = ours.heads(rows.states[0])
    assert q is not None
    for value, reference in ((mine_logits, logits), (q[:, 0], q_halt), (q[:, 1], q_continue)):
        expected = reference.float().numpy()
        assert np.abs(value - expected).max() <= 2 * bound * np.abs(expected).max()
    np.testing.assert_array_equal(step.predictions, mine_logits.argmax(-1))
    expected_margin = q[:, 0] - q[:, 1] if name in ("hrm", "hrm-mlp_t", "trm-continue") else q[:, 0]
    np.testing.assert_array_equal(step.margin, expected_margin)


def test_results_are_those_of_the_torch_model(tmp_path: Path) -> None:
    model = model_of("trm-mlp_t")
    batch = make_batch(3, rows=17)
    ours = runtime.Solver(runtime.load(saved(model, tmp_path), threads=1), batch_size=4, history=True)
    theirs = Solver(model, batch_size=4, history=True)
    for mine, reference in zip(ours.solve(batch), theirs.solve(batch), strict=True):
        np.testing.assert_array_equal(mine.history, reference.history)
        assert (mine.steps, mine.halted) == (reference.steps, reference.halted)
        assert mine.q_halt == pytest.approx(reference.q_halt, abs=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_does_not_depend_on_who_shares_the_batch(dtype: str, threads: int, tmp_path: Path) -> None:
    model = runtime.load(saved(model_of("trm"), tmp_path), dtype, threads)
    batch = make_batch(5, rows=19)
    for options in ({}, {"trajectories": 3, "noise": 0.3}, {"halt": Never()}):
        results = [
            [key(r) for r in Solver(model, batch_size=size, history=True, **options).solve(batch)]
            for size in (1, 3, 64)
        ]
        assert results[0] == results[1] == results[2]
    assert len({row[2] for row in results[0]}) == 1  # never halting: the steps of all


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    values = np.concatenate((bits.view(np.float32), np.array([np.inf, -np.inf, 0.0, 1.00390625], dtype=np.float32)))
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(widen(narrow(values, "bf16")), expected.float().numpy())
    assert np.isnan(widen(narrow(np.array([np.nan], dtype=np.float32), "bf16"))).all()


def test_a_model_without_a_q_head(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = saved(model_of("trm"), tmp_path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "q_head" not in name}  # noqa: SIM118
        save_file(tensors, tmp_path / "headless.safetensors", file.metadata())
    model = runtime.load(tmp_path / "headless.safetensors", threads=1)
    with pytest.raises(ValueError, match=r"^halt: got Confident\(threshold=0\.0\), the model has no Q head; accepted"):
        Solver(model)
    with pytest.raises(ValueError, match=r"^choose: got 'q', the model has no Q head; accepted is majority$"):
        Solver(model, halt=Unchanged(), trajectories=2, noise=0.1, choose="q")
    results = list(Solver(model, halt=Unchanged()).solve(make_batch(3)))
    assert [result.confidence for result in results] == [None] * 3
    voted = list(Solver(model, halt=Never(), trajectories=3, noise=0.1, choose="majority").solve(make_batch(3)))
    assert len(voted) == 3


def test_a_model_saved_in_its_loss_head(tmp_path: Path) -> None:
    model = model_of("trm")
    path = tmp_path / "head.safetensors"
    trmfast.save(ACTLossHead(model, "stablemax_cross_entropy"), path)
    loaded = runtime.load(path, threads=1)
    assert len(list(Solver(loaded).solve(make_batch(3)))) == 3


def test_files_that_are_no_models(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved(model_of("trm"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^path: got .*none\.safetensors, accepted are files that can be read"):
        runtime.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"^dtype: got 'int4', accepted are float32, bfloat16, int8$"):
        runtime.load(path, "int4")
    with pytest.raises(ValueError, match=r"^threads: got 0, accepted are integers >= 1$"):
        runtime.load(path, threads=0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"^path: .* is not a whole safetensors file: "):
        runtime.load(damaged)
    tensors = load_file(path)
    save_file(tensors, damaged)
    with pytest.raises(ValueError, match=r"^path: .* does not say which model it is; accepted are files of trmfast\."):
        runtime.load(damaged)
    about = json.loads(json.dumps({"version": 1, "config": vars(model_of("trm").config), "window": 1, "loss": None}))
    for change, message in (
        ({"model": "GPT"}, r"^path: the model is 'GPT', accepted are TRM, "),
        (
            {"model": "TRM", "config": about["config"] | {"vocab_size": 9}},
            r"^inner\.embed_tokens.* got shape \[7, 32\]",
        ),
        ({"model": "HRM"}, r"^path: has no tensor inner\.H_level\.layers\.0"),
    ):
        save_file(tensors, damaged, {"trmfast": json.dumps(about | change)})
        with pytest.raises(ValueError, match=message):
            runtime.load(damaged)


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_imports_pytorch(tmp_path: Path) -> None:
    path = saved(model_of("trm"), tmp_path)
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
import trmfast
from trmfast import runtime
model = runtime.load(sys.argv[1])
solver = runtime.Solver(model, trajectories=2, noise=0.1)
print([r.steps for r in solver.solve([[0, 1, 2, 3, 4, 5]] * 3)])
assert runtime.Solver is trmfast.Solver
assert trmfast.NetSpec and trmfast.RecursionProgram
print(sorted(name for name in sys.modules if name.startswith("torch")))
"""
    steps, modules = run(code, str(path)).splitlines()
    assert len(json.loads(steps)) == 3
    assert modules == "[]"


@pytest.mark.breadth
def test_the_package_imports_pytorch_on_first_use() -> None:
    uses = "trmfast.backends.cpu.targets(), trmfast.nn.Net, trmfast.recursion, trmfast.TRM, trmfast.Problem"
    run(f"import sys, trmfast; assert 'torch' not in sys.modules; {uses}; from trmfast import *; recursion, BlockSpec")
    # Programs from torch.export find the operators once both are imported.
    run("import torch, trmfast; torch.ops.trmfast.recursion")


def test_confident_halts_as_with_torch(tmp_path: Path) -> None:
    model = model_of("trm-mlp_t", no_ACT_continue=False)
    loaded = runtime.load(saved(model, tmp_path), threads=1)
    batch = make_batch(3, rows=17)
    for threshold in (-0.4, 0.0, 0.4):
        mine = [r.steps for r in Solver(loaded, halt=Confident(threshold)).solve(batch)]
        assert mine == [r.steps for r in Solver(model, halt=Confident(threshold)).solve(batch)]
