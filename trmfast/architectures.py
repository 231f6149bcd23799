"""The parameters that define each recursive model, as data.  Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trmfast.config import HRMConfig, ModelConfig, TRMConfig, URMConfig
from trmfast.program import GradientWindow, RecursionProgram

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A recursive model.

    Attributes:
        config: its configuration class.
        program: makes the program from H_cycles, L_cycles and a gradient window.
        window: the gradient window of the published model.
        nets: (module name, config key of its depth), in the order of the program's nets.
        inits: names of the buffers that hold the initial states, in the order of the program's states; the heads read
            the first state.
    """

    config: type[ModelConfig]
    program: Callable[[int, int, GradientWindow], RecursionProgram]
    window: GradientWindow
    nets: tuple[tuple[str, str], ...]
    inits: tuple[str, ...]


_ONE = (("L_level", "L_layers"),)
_TWO = (("H_level", "H_layers"), ("L_level", "L_layers"))
_SIX = tuple(f"L{k}_init" for k in range(1, 7))

ARCHITECTURES: dict[str, Architecture] = {
    "TRM": Architecture(TRMConfig, RecursionProgram.trm, "last_cycle", _ONE, ("H_init", "L_init")),
    "TRMSingleZ": Architecture(TRMConfig, RecursionProgram.single_z, "last_cycle", _ONE, ("L_init",)),
    "TRMHier6": Architecture(TRMConfig, RecursionProgram.hier6, "last_cycle", _ONE, ("H_init", *_SIX)),
    "HRM": Architecture(HRMConfig, RecursionProgram.hrm, "one_step", _TWO, ("H_init", "L_init")),
    "URM": Architecture(URMConfig, RecursionProgram.urm, "last_cycle", (("layers", "L_layers"),), ("init_hidden",)),
}
"""Every model by the name of its class."""
