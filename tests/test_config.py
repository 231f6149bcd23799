"""Configurations: what is taken, and what is said about the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from model_cases import HRM_SUDOKU, SUDOKU, TINY
from trmfast.models import HRM, TRM, URM, ACTModel, HRMConfig, ModelConfig, TRMConfig, TRMHier6, TRMSingleZ, URMConfig


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"vocab_size": None}, ValueError, "config_dict: got no vocab_size, required by TRMConfig"),
        ({"hidden_size": "32"}, TypeError, "hidden_size: got '32' (str), accepted is int"),
        ({"L_cycles": True}, TypeError, "L_cycles: got True (bool), accepted is int"),
        ({"H_cycles": 1.5}, TypeError, "H_cycles: got 1.5 (float), accepted is int"),
        ({"mlp_t": "no"}, TypeError, "mlp_t: got 'no' (str), accepted is bool"),
        ({"L_layers": 0}, ValueError, "L_layers: got 0, accepted are integers >= 1"),
        ({"num_heads": 64}, ValueError, "num_heads: got 64, accepted are 1 to hidden_size 32"),
        (
            {"num_heads": 7, "hidden_size": 64},
            ValueError,
            "num_heads: got 7, accepted are divisors of hidden_size 64 that make heads of even width",
        ),
        ({"pos_encodings": "ropes"}, ValueError, "pos_encodings: got 'ropes', accepted are rope, learned, none"),
        ({"forward_dtype": "int4"}, ValueError, "forward_dtype: got 'int4', accepted are bfloat16"),
        ({"halt_exploration_prob": 2}, ValueError, "halt_exploration_prob: got 2.0, accepted are 0 to 1"),
        ({"puzzle_emb_ndim": 100}, ValueError, "puzzle_emb_len: got 3, accepted are 0 and integers >= 4"),
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


@pytest.mark.parametrize(
    "cls, differs, message",
    [
        (TRM, {"L_cycle": 9}, "config_dict: L_cycle is not used; did you mean L_cycles?"),
        (TRM, {"h_cycles": 9}, "config_dict: h_cycles is not used; did you mean H_cycles?"),
        (
            TRM,
            {"L_cycle": 9, "hidden_sizee": 3},
            "config_dict: L_cycle, hidden_sizee are not used; did you mean L_cycles, hidden_size?",
        ),
        (HRM, {"halt_max_step": 2}, "config_dict: halt_max_step is not used; did you mean halt_max_steps?"),
        (URM, {"loop": 2}, "config_dict: loop is not used; did you mean loops?"),
    ],
)
def test_a_misspelt_key_is_named_in_one_warning(cls: type[ACTModel], differs: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=r"^config_dict: ") as record:
        cls(TINY | differs)
    assert [str(warning.message) for warning in record] == [message]
    assert record[0].filename == __file__


# What upstream's configurations carry besides the keys of the model: the loss and the training script's own.
LOSS = {"name": "models@Model", "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"}}
TRAINING = dict.fromkeys([
    "data_path", "data_paths", "data_paths_test", "evaluators", "global_batch_size", "grad_accum_steps", "epochs",
    "eval_interval", "checkpoint_every_eval", "checkpoint_path", "load_checkpoint", "lr", "lr_min_ratio",
    "lr_warmup_steps", "target_q_update_every", "weight_decay", "puzzle_emb_weight_decay", "puzzle_emb_lr",
    "use_muon", "seed", "min_eval_interval", "ema", "ema_rate", "freeze_weights", "defaults", "hydra",
    "project_name", "run_name",
])  # fmt: skip
URM_KEYS = {"num_layers": 4, "loops": 16, "loop_deltas": [0, 8], "profile": True}


@pytest.mark.parametrize("extra", [{}, TRAINING], ids=["model", "training"])
@pytest.mark.parametrize(
    "kind, config",
    [
        (TRMConfig, SUDOKU | {"mlp_t": False, "no_ACT_continue": True}),
        (HRMConfig, HRM_SUDOKU | {"mlp_t": False, "no_ACT_continue": True}),
        (URMConfig, SUDOKU | URM_KEYS),
    ],
    ids=["trm", "hrm", "urm"],
)
def test_published_configurations_are_taken_in_silence(
    kind: type[ModelConfig], config: dict[str, Any], extra: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind.from_dict(config | LOSS | extra)


@pytest.mark.parametrize("cls", [TRM, TRMSingleZ, TRMHier6, HRM, URM])
def test_a_configuration_is_one_dict(cls: type[ACTModel]) -> None:
    accepted = rf"accepted is one dict: {cls.__name__}\(config\)$"
    with pytest.raises(TypeError, match=f"^config_dict: got keyword arguments, {accepted}"):
        cls(**TINY)
    with pytest.raises(TypeError, match=f"^config_dict: got None, {accepted}"):
        cls(None)
