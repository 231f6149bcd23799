"""Adaptive computation time: the wrapper that feeds puzzles into halted rows and decides which rows halt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trmfast.config import ModelConfig
from trmfast.models.carry import Carry
from trmfast.models.inner import Family, Inner
from trmfast.models.sparse_embedding import CastedSparseEmbedding
from trmfast.program import GradientWindow

__all__ = ["ACTModel"]


class ACTModel(nn.Module):
    """A recursive model with adaptive computation time; one call is one supervision step.

    Args:
        config_dict: the keys of the model's configuration class; other keys are ignored, with a warning if one looks
            like a misspelt key.

    Attributes:
        halt_max_steps, halt_exploration_prob: as in the configuration; may be changed between calls.

    Raises:
        TypeError: a configuration value of the wrong type.
        ValueError: a missing key or a value out of range.
    """

    config_type: ClassVar[type[ModelConfig]]
    family: ClassVar[Family]

    def __init__(self, config_dict: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        if config_dict is None or keywords:
            got = "keyword arguments" if keywords else "None"
            raise TypeError(f"config_dict: got {got}, accepted is one dict: {type(self).__name__}(config)")
        super().__init__()
        self.config: Any = self.config_type.from_dict(config_dict)
        self.halt_max_steps: int = self.config.halt_max_steps
        self.halt_exploration_prob: float = self.config.halt_exploration_prob
        self.inner = Inner(self.config, self.family)

    # ---------------------------------------------------------------- what may change between calls

    @property
    def puzzle_emb(self) -> CastedSparseEmbedding:
        """The puzzle embedding; AttributeError if the model has none."""
        return self.inner.puzzle_emb

    @property
    def H_cycles(self) -> int:
        """Cycles of the recursion; assign to change them."""
        return self.inner.H_cycles

    @H_cycles.setter
    def H_cycles(self, value: int) -> None:
        self.inner.set_cycles(value, self.inner.L_cycles)

    @property
    def L_cycles(self) -> int:
        """Low-level updates in each cycle; assign to change them."""
        return self.inner.L_cycles

    @L_cycles.setter
    def L_cycles(self, value: int) -> None:
        self.inner.set_cycles(self.inner.H_cycles, value)

    @property
    def window(self) -> GradientWindow:
        """Gradient window: ``"one_step"``, ``"last_cycle"``, ``"all"``, ``"none"``, or k for the last k cycles."""
        return self.inner.window

    @window.setter
    def window(self, value: GradientWindow) -> None:
        self.inner.set_window(value)

    @property
    def backend(self) -> str:
        """Backend of the recursion, ``"auto"`` for the best that supports the problem; assign to change it."""
        return self.inner.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self.inner.set_backend(value)

    # ---------------------------------------------------------------- steps

    def initial_carry(self, batch: Mapping[str, Tensor]) -> Carry:
        """A carry in which every row has halted, so that the first step takes the whole batch.

        Args:
            batch: ``inputs`` [B, S] and whatever else a row has, all with B rows; the carry is made on their device.

        Raises:
            TypeError: an entry of ``batch`` that the model reads is not a tensor.
            ValueError: a key is missing, ``inputs`` has another shape, or token ids or identifiers are not integers.
        """
        self._check(batch)
        rows, device = batch["inputs"].shape[0], batch["inputs"].device
        return Carry(
            inner_carry=self.inner.empty_carry(rows, device),
            steps=torch.zeros(rows, dtype=torch.int32, device=device),
            halted=torch.ones(rows, dtype=torch.bool, device=device),
            current_data={key: torch.zeros_like(value) for key, value in batch.items()},
        )

    def forward(
        self, carry: Carry, batch: Mapping[str, Tensor], compute_target_q: bool = True
    ) -> tuple[Carry, dict[str, Tensor]]:
        """One supervision step.

        Halted rows take their data from ``batch`` and start from the initial states; the others continue with the data
        in the carry.  In training a row halts when the q head says so, but not before a random number of
        steps with probability ``halt_exploration_prob``.  In evaluation every row takes ``halt_max_steps`` steps.

        Args:
            carry: from :meth:`initial_carry` or the step before.
            batch: new data, with the keys and shapes of ``carry.current_data``.
            compute_target_q: whether training bootstraps a target for the continue logits, where the model has one;
                URM's training script asks for it on every fourth step only.

        Raises:
            TypeError: ``carry`` is not one of this model, or ``batch`` holds something other than tensors.
            ValueError: a key of ``batch`` is missing or of another shape, or token ids or identifiers are not integers.

        Returns:
            The new carry, without gradient, and the outputs: ``logits`` [B, S, V] in the forward dtype,
            ``q_halt_logits`` and ``q_continue_logits`` float32 [B], and, if training bootstraps a target for the
            latter, ``target_q_continue`` float32 [B].
        """
        check_carry("carry", carry, Carry, ("inner_carry", "steps", "halted", "current_data"))
        check_carry("carry.inner_carry", carry.inner_carry, self.inner.family.carry, self.inner.state_names)
        self._check(batch, *carry.current_data)
        for key, old in carry.current_data.items():
            got = list(batch[key].shape)
            if got != list(old.shape):
                raise ValueError(f"batch[{key!r}]: got shape {got}, accepted is {list(old.shape)}, that of the carry")
        halted = carry.halted
        states = self.inner.reset_carry(halted, carry.inner_carry)
        steps = torch.where(halted, 0, carry.steps)
        data = {
            key: torch.where(halted.view(-1, *(1,) * (old.ndim - 1)), batch[key], old)
            for key, old in carry.current_data.items()
        }
        states, logits, (q_halt, q_continue) = self.inner(states, data)
        outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}

        with torch.no_grad():
            steps = steps + 1
            last = steps >= self.halt_max_steps
            halted = last
            if self.training and self.halt_max_steps > 1:
                bootstrap = not self.config.no_ACT_continue
                halted = halted | (q_halt > q_continue if bootstrap else q_halt > 0)
                explore = torch.rand_like(q_halt) < self.halt_exploration_prob
                halted = halted & (steps >= explore * torch.randint_like(steps, low=2, high=self.halt_max_steps + 1))
                if bootstrap and compute_target_q:
                    # One step of lookahead takes the place of a target network and a replay buffer (arXiv 2407.04811).
                    next_halt, next_continue = self.inner(states, data)[-1]
                    value = torch.where(last, next_halt, torch.maximum(next_halt, next_continue))
                    outputs["target_q_continue"] = torch.sigmoid(value)
        return Carry(states, steps, halted, data), outputs

    def _check(self, batch: Mapping[str, Tensor], *in_carry: str) -> None:
        required = ["inputs", "puzzle_identifiers"] if self.config.puzzle_emb_ndim > 0 else ["inputs"]
        required += [key for key in in_carry if key not in required]
        missing = [key for key in required if key not in batch]
        if missing:
            raise ValueError(f"batch: got no {', '.join(missing)}, required are {', '.join(required)}")
        for key in required:
            if not isinstance(batch[key], Tensor):
                raise TypeError(f"batch[{key!r}]: got {type(batch[key]).__name__}, accepted are Tensor")
        dtype, shape = batch["inputs"].dtype, batch["inputs"].shape
        if dtype.is_floating_point or dtype.is_complex:
            raise ValueError(f"batch['inputs'].dtype: got {_short(dtype)}, accepted are integers, as int32 and int64")
        if self.config.puzzle_emb_ndim > 0 and batch["puzzle_identifiers"].dtype not in (torch.int32, torch.int64):
            got = _short(batch["puzzle_identifiers"].dtype)
            raise ValueError(f"batch['puzzle_identifiers'].dtype: got {got}, accepted are int32 and int64")
        if len(shape) != 2 or shape[1] != self.config.seq_len:
            raise ValueError(
                f"inputs: got shape {list(shape)}, accepted is [batch, {self.config.seq_len}], the config's seq_len"
            )


def check_carry(name: str, carry: Any, kind: type, names: Sequence[str]) -> None:
    """TypeError unless ``carry`` has the fields ``names`` of ``kind``, as upstream's own carries do."""
    if not all(hasattr(carry, field) for field in names):
        raise TypeError(f"{name}: got {type(carry).__name__}, accepted is {kind.__name__}, from initial_carry")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
