"""Small models of every structure that accelerate() takes, and what is done with them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trmfast
from dropin_models import HRM, TRM, URM, Baseline, Hier6, NanoTRM, SingleZ
from trmfast.dropin import UnsupportedModelError

TINY: dict[str, Any] = {
    "batch_size": 4,
    "seq_len": 9,
    "puzzle_emb_ndim": 40,
    "puzzle_emb_len": 3,
    "num_puzzle_identifiers": 5,
    "vocab_size": 7,
    "H_cycles": 2,
    "L_cycles": 2,
    "H_layers": 1,
    "L_layers": 2,
    "num_layers": 2,
    "hidden_size": 32,
    "expansion": 1,
    "num_heads": 2,
    "pos_encodings": "rope",
    "rms_norm_eps": 1e-5,
    "mlp_t": False,
    "halt_max_steps": 4,
    "loops": 4,
    "halt_exploration_prob": 0.5,
    "forward_dtype": "float32",
}
MLP = {"mlp_t": True, "pos_encodings": "none"}

# name -> (class, what differs from TINY)
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "trm": (TRM, {"L_cycles": 3}),
    "trm-mlp_t": (TRM, MLP),
    "trm-learned": (TRM, {"pos_encodings": "learned"}),
    "trm-bare": (TRM, {"pos_encodings": "none", "puzzle_emb_ndim": 0, "puzzle_emb_len": 0}),
    "trm_singlez": (SingleZ, {}),
    "trm_hier6": (Hier6, {"L_cycles": 3}),
    "hrm": (HRM, {"L_layers": 1, "H_layers": 2}),
    "hrm-mlp_t": (HRM, MLP),
    "baseline": (Baseline, {"H_layers": 3}),
    # 12 heads of 3 over a width of 40, as the published 12 heads of 42 over 512
    "baseline-odd": (Baseline, {"hidden_size": 40, "num_heads": 12, "pos_encodings": "none"}),
    "urm": (URM, {"L_cycles": 3}),
    "nano": (NanoTRM, {}),
    "nano-2d": (NanoTRM, {"pos_encodings": "2d"}),
    "nano-mlp_t": (NanoTRM, MLP),
    "nano-bare": (NanoTRM, {"pos_encodings": "2d", "puzzle_emb_ndim": 0, "puzzle_emb_len": 0}),
}


def make(name: str, seed: int = 0, scale: float = 1.0, **extra: Any) -> Any:
    """A model, the weights of its networks times ``scale``."""
    cls, differs = CASES[name]
    torch.manual_seed(seed)
    model = cls(TINY | differs | extra)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".layers." in key and parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def make_batch(name: str, seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (2, rows, 9), generator=generator, dtype=torch.int32)
    tokens[1, :, 0] = -100
    ids = torch.randint(5, (rows,), generator=generator, dtype=torch.int32)
    return {inputs_of(name): tokens[0], "labels": tokens[1], "puzzle_identifiers": ids}


def inputs_of(name: str) -> str:
    return "input" if name.startswith("nano") else "inputs"


def inner_of(model: Any) -> Any:
    """The module that accelerate() swaps."""
    while not hasattr(model, "lm_head"):
        names = ("inner", "model", "module", "_orig_mod")
        model = getattr(model, next(name for name in names if name in model._modules))
    return model


def states_of(carry: Any) -> dict[str, Tensor]:
    carry = getattr(carry, "inner_carry", carry)
    return {name: value for name, value in vars(carry).items() if name.startswith(("z_", "current_hidden"))}


def step(model: Any, batch: dict[str, Tensor], steps: int = 1, seed: int = 3) -> dict[str, Tensor]:
    """States, heads and gradients after some supervision steps from the start, the last one differentiated."""
    model.zero_grad(set_to_none=True)
    carry = model.initial_carry(batch)
    torch.manual_seed(seed)
    for _ in range(steps):
        carry, outputs = model(carry, batch)
    heads = torch.cat([outputs[key].flatten().double() for key in outputs if key.startswith(("logits", "q_"))])
    results = dict(states_of(carry))
    # Two numbers a row are too few to judge an error by, so q is judged together with the logits.
    results["heads"] = heads.detach().to(outputs["logits"].dtype)
    if "target_q_continue" in outputs:
        results["target"] = outputs["target_q_continue"]
    puzzle = getattr(inner_of(model), "puzzle_emb", None)
    if not any(p.requires_grad for p in model.parameters()) or not heads.requires_grad:
        return results
    rows = None if puzzle is None or not puzzle.local_weights.is_leaf else puzzle.local_weights
    if rows is not None:
        rows.grad = None
    heads.backward(torch.randn(heads.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"grad {key}"] = parameter.grad.clone()
    if rows is not None and rows.grad is not None:
        results["grad puzzle"] = rows.grad.clone()
    return results


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two results are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for float32 rounding, as a guard against results of something else."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], rtol=1e-3, atol=1e-4), key


def refused(model: nn.Module) -> tuple[str, ...]:
    """The differences; the model computes afterwards what it did before."""
    types = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        trmfast.accelerate(model)
    assert isinstance(caught.value, ValueError)
    differences = caught.value.differences
    assert all(f"\n  - {line}" in str(caught.value) for line in differences)
    assert all("\n" not in line for line in differences)
    assert [type(module) for module in model.modules()] == types
    assert pickle.loads(pickle.dumps(caught.value)).differences == differences
    return differences


def blocks(model: Any) -> Any:
    return model.inner.L_level.layers


class Recursions(TorchDispatchMode):
    """Counts the recursions that run as an operator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.trmfast.recursion.default
        return func(*args, **(kwargs or {}))


def fused_calls(model: Any, batch: dict[str, Tensor]) -> int:
    """How many recursions one evaluation step runs as an operator."""
    carry = model.initial_carry(batch)
    training = model.training
    with torch.no_grad(), Recursions() as recursions:
        model.eval()(carry, batch)
    model.train(training)
    return recursions.count
