"""Draws trials and variants.  Number i of a seed is the same whatever ran before it, so that it can be run again."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from trmfast.backends.cpu import CHOICES
from trmfast.spec import NOT_FOR_MLP_T

from .checks import CHECKS
from .layouts import LAYOUTS
from .trial import Program, Trial
from .variant import Variant, targets_for

__all__ = ["draw_checks", "draw_trial", "draw_variant", "generator"]

# Sizes around the widths of vectors (4, 8, 16), panels (32) and row tiles (4, 6, 14, 32), and those far from them.
WIDTHS = (1, 2, 3, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 127, 128, 130)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 63, 64, 65, 97, 127, 129, 200)
INNER = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 545)
HEADS = (1, 1, 2, 2, 3, 4, 5, 8, 16, 33)
HEAD_DIMS = (1, 2, 3, 4, 6, 8, 10, 15, 16, 17, 32, 34, 64)
WINDOWS = (1, 2, 3, 5, 8, 16, 33)
DRAWN_ABOVE = ("token_mixer", "causal", "attention_window")
# The largest factors: far beyond, attention scores, gated products and sums of squares overflow (docs/cpu.md).
HUGE = {"states": 1e4, "x": 1e4, "weights": 1e4, "grads": 1e20}
# Multiply-adds of a forward pass: most trials are small, so that there are many of them.
MOST_WORK, MOST_WORK_OF_FEW = 300_000, 6_000_000


def generator(seed: int, kind: str, number: int) -> random.Random:
    """The random numbers of one trial or file."""
    return random.Random(f"{seed}/{kind}/{number}")


def draw_trial(rng: random.Random) -> Trial:
    """A trial that the CPU engine takes."""
    most = MOST_WORK if rng.random() < 0.93 else MOST_WORK_OF_FEW
    while True:
        trial = _draw(rng)
        if trial.work <= most:
            return trial


def _draw(rng: random.Random) -> Trial:
    mixer = rng.choices(("attention", "mlp_t", "simple_gla"), (4, 3, 2))[0]
    attends = mixer != "mlp_t"
    heads = rng.choice(HEADS)
    rope = attends and rng.random() < 0.7
    trial = Trial(
        program=_program(rng),
        hidden_size=rng.choice(WIDTHS),
        intermediate_size=rng.choice(INNER),
        token_mixer=mixer,
        channel_mixer="conv_swiglu" if rng.random() < 0.3 else "swiglu",
        num_heads=heads,
        num_kv_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=rng.choice([n for n in HEAD_DIMS if not rope or n % 2 == 0]),
        causal=mixer == "attention" and rng.random() < 0.35,
        seq_intermediate_size=rng.choice(INNER),
        conv_kernel=rng.randint(1, 8),
        rms_norm_eps=rng.choice((1e-5, 1e-5, 1e-5, 1e-6, 1e-8, 1e-3, 0.5)),
        num_layers=rng.choice((1, 1, 1, 2, 2, 3)),
        batch=rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 7, 9)),
        length=rng.choice(LENGTHS),
        rope=rope,
        dtype=rng.choice(("float32", "bfloat16")),
        weight_dtype=rng.choice(("float32",) * 5 + ("bfloat16", "float16", "float64")),
        weight_scale=rng.choice((0.5, 0.5, 0.7)),
        scales=_scales(rng),
        layouts=_layouts(rng),
        needs=_needs(rng),
        seed=rng.randrange(1000),
    )
    if not attends:
        trial = replace(trial, num_heads=1, num_kv_heads=1, head_dim=16)
    else:
        trial = replace(trial, seq_intermediate_size=16)
    trial = replace(trial, **_options(rng, mixer))
    if trial.channel_mixer != "conv_swiglu":
        trial = replace(trial, conv_kernel=2)
    if trial.weight_dtype == "float16" and trial.scales == (("grads", HUGE["grads"]),):
        trial = replace(trial, scales=())  # these gradients come in the dtype of the weights
    normed = trial.hidden_size == 1 or (not attends and trial.length == 1)
    if normed and trial.dtype == "bfloat16":
        trial = replace(trial, dtype="float32")  # a norm over one element
    if rng.random() < 0.01:
        trial = replace(trial, batch=0)
    elif attends and rng.random() < 0.005:
        trial = replace(trial, length=0)
    return trial


def _options(rng: random.Random, mixer: str) -> dict[str, Any]:
    """What the engine runs besides the block of the puzzle models: nothing in half of the trials, else up to three."""
    values: dict[str, Any] = {name: accepted for name, accepted in CHOICES.items() if name not in DRAWN_ABOVE}
    if "attention_window" in CHOICES:
        values["attention_window"] = WINDOWS
    if mixer == "simple_gla":
        del values["attention_window"]
    if mixer == "mlp_t":
        values = {name: accepted for name, accepted in values.items() if name not in NOT_FOR_MLP_T}
    if not values or rng.random() < 0.5:
        return {}
    names = rng.sample(sorted(values), min(len(values), rng.choice((1, 1, 2, 3))))
    found = {name: rng.choice(values[name]) for name in names}
    return {**found, "causal": mixer == "attention", "attention_window": 0} if found.get("segments") else found


def _program(rng: random.Random) -> Program:
    if rng.random() < 0.6:
        name = rng.choice(("trm", "hrm", "single_z", "hier6", "urm"))
        H_cycles, L_cycles = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))
        window = rng.choice(("one_step", "last_cycle", "all", "all", "none", rng.randint(1, H_cycles)))
        return (name, H_cycles, L_cycles, window)
    states, nets = rng.randint(1, 4), rng.choice((1, 1, 2, 3))
    return tuple(_update(rng, states, nets) for _ in range(rng.choice((1, 1, 2, 3, 4, 6))))


def _update(rng: random.Random, states: int, nets: int) -> tuple[int, tuple[int, ...], bool, int, bool]:
    sources = tuple(rng.randrange(states) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5))))
    inject = not sources or rng.random() < 0.5
    return rng.randrange(states), sources, inject, rng.randrange(nets), rng.random() < 0.7


def _scales(rng: random.Random) -> tuple[tuple[str, float], ...]:
    """Mostly none; else a group of tensors that is zero, tiny or huge."""
    if rng.random() < 0.85:
        return ()
    group = rng.choice(("states", "x", "grads", "weights"))
    return ((group, rng.choice((0.0, 1e-38, 1e-30, 1e-20, 1e-6, 1e4, HUGE[group]))),)


def _layouts(rng: random.Random) -> tuple[tuple[str, str], ...]:
    groups = [group for group in ("states", "x", "weights", "grads", "tables") if rng.random() < 0.3]
    # Weights and tables differ along their first axis.
    chosen = [(group, rng.choice(LAYOUTS[: -1 if group in ("weights", "tables") else None])) for group in groups]
    return tuple((group, layout) for group, layout in chosen if layout != "plain")


def _needs(rng: random.Random) -> tuple[str, ...]:
    if rng.random() < 0.75:
        return ("all",)
    return tuple(group for group in ("states", "x", "weights") if rng.random() < 0.5)


def draw_variant(rng: random.Random, trial: Trial, targets: list[str]) -> Variant | None:
    """One variant, of a target that computes in the trial's dtype; the emulation, which is slow, comes seldom.

    Args:
        rng: random numbers.
        trial: what is to be run.
        targets: these alone; all that run here if empty.
    """
    able = [target for target in targets_for(trial.torch_dtype) if not targets or target in targets]
    if not able:
        return None
    return Variant(
        target=rng.choices(able, [1 if target == "amx_emulated" else 4 for target in able])[0],
        threads=rng.choice((1,) * 6 + (2, 3, 5)),
        recompute=rng.choice((True, True, False, 2_000, 30_000, "300kB")),
        store=rng.choice((0, 0, 1, 20_000, 200_000)),
        dirty=rng.random() < 0.5,
    )


def draw_checks(rng: random.Random) -> list[str]:
    """The policy, and two of the other checks."""
    return ["policy", *rng.sample([name for name in CHECKS if name != "policy"], 2)]
