"""Configurations: what is taken, and what is said about the rest."""

from __future__ import annotations

from typing import Any

import pytest

from model_cases import TINY
from trmfast.models import TRM


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"vocab_size": None}, ValueError, "config_dict: got no vocab_size, required by TRMConfig"),
        ({"hidden_size": "32"}, TypeError, "hidden_size: got '32' (str), accepted is int"),
        ({"L_cycles": True}, TypeError, "L_cycles: got True (bool), accepted is int"),
        ({"H_cycles": 1.5}, TypeError, "H_cycles: got 1.5 (float), accepted is int"),
        ({"mlp_t": "no"}, TypeError, "mlp_t: got 'no' (str), accepted is bool"),
        ({"L_layers": 0}, ValueError, "L_layers: got 0, accepted are integers from 1 up"),
        ({"num_heads": 64}, ValueError, "num_heads: got 64, accepted are 1 to hidden_size 32"),
        ({"num_heads": 32}, ValueError, "num_heads: got 32, accepted are head counts that make heads of even width"),
        ({"pos_encodings": "ropes"}, ValueError, "pos_encodings: got 'ropes', accepted are rope, learned, none"),
        ({"forward_dtype": "int8"}, ValueError, "forward_dtype: got 'int8', accepted are bfloat16"),
        ({"halt_exploration_prob": 2}, ValueError, "halt_exploration_prob: got 2.0, accepted are 0 to 1"),
        ({"puzzle_emb_ndim": 100}, ValueError, "puzzle_emb_len: got 3, accepted are 0 and integers from 4 up"),
        ({"backend": "x"}, ValueError, "backend: got 'x', accepted are auto"),
    ],
)
def test_wrong_configurations_say_so_in_one_line(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(kind) as info:
        TRM(config)
    assert str(info.value).startswith(message)
    assert "\n" not in str(info.value)


def test_yaml_neighbours_of_a_type_are_taken() -> None:
    config = TRM(TINY | {"expansion": 1, "H_cycles": 2.0}).config
    assert isinstance(config.expansion, float)
    assert isinstance(config.H_cycles, int)
