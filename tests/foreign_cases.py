"""Models of tiny-recursive-model and hrm-pytorch, small, and what is done with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from HRM import HRM, HRM_ACT
from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel
from tiny_recursive_model.trm_dense_loss import TinyRecursiveModel as DenseTinyRecursiveModel
from torch import Tensor, nn
from x_transformers import Encoder  # type: ignore[import-untyped]

from trmfast import foreign
from trmfast.benchmark import memory

DIM, LENGTH, TOKENS, ROWS = 32, 8, 10, 3


def network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, DIM), nn.LayerNorm(DIM))


def encoder() -> dict[str, Any]:
    return {"dim": DIM, "depth": 1, "heads": 2, "attn_dim_head": 16, "use_rmsnorm": True, "rotary_pos_emb": True}


def mixer(dropout: float = 0.0) -> nn.Module:
    made: nn.Module = MLPMixer1D(dim=DIM, depth=2, seq_len=LENGTH, dropout=dropout)
    return made


# The models of both packages, with every kind of network that they bring.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "trm-mixer": lambda: TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer()),
    "trm-encoder": lambda: TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=Encoder(**encoder())),
    "trm-dense": lambda: DenseTinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer(), recurrent_grad_depth=2),
    "hrm": lambda: HRM([encoder(), encoder()], dim=DIM, num_tokens=TOKENS),
    "hrm-3": lambda: HRM([encoder(), encoder(), encoder()], dim=DIM, num_tokens=TOKENS, reasoning_steps=1),
    "hrm-act": lambda: HRM_ACT([encoder(), encoder()], dim=DIM, num_tokens=TOKENS, max_reasoning_steps=3),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    halt = getattr(model, "to_halt_pred", None)
    if halt is not None:
        nn.init.normal_(halt[1].weight, std=0.1)  # zero as made, so that no gradient would reach it from there
    return model


def puzzle(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (2, ROWS, LENGTH), generator=generator)
    return tokens[0], tokens[1]


def step(model: nn.Module, seed: int = 0) -> Tensor:
    """The loss of one training step, with the same draws whenever it is called."""
    seq, labels = puzzle(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    states = model.get_initial() if hasattr(model, "get_initial") else ()  # type: ignore[operator]
    loss: Tensor = model(seq, *states, labels=labels)[0]
    return loss


def outputs(model: nn.Module) -> list[Tensor]:
    """Everything that the model returns without labels, and what it predicts."""
    seq, _ = puzzle()
    random.seed(0)
    if hasattr(model, "predict"):
        found = [*model(seq, *model.get_initial()), *model.predict(seq, max_deep_refinement_steps=2)]  # type: ignore[operator]
    else:
        logits, hiddens, *rest = model(seq)
        found = [logits, *hiddens, *rest]
    return [tensor.detach() for tensor in found]


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor | None]:
    model.zero_grad()
    step(model, seed).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same(a: Mapping[Any, Tensor | None], b: Mapping[Any, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        (g is None) == (b[name] is None) and (g is None or torch.equal(g, b[name]))  # type: ignore[arg-type]
        for name, g in a.items()
    )


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps after forward, without parameters and buffers."""
    return memory.saved_bytes(run, model.parameters(), model.buffers())


def swap(model: nn.Module) -> nn.Module:
    found = foreign.recognise(model)
    assert found is not None
    found.swap()
    return model
