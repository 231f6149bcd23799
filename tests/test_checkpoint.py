"""Checkpoints: every form that people have, what the tensors tell, and files that describe themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trmfast
from checkpoint_cases import UNTOLD, make, same, steps, words
from model_cases import CASES, MLP, SUDOKU, TINY, make_batch
from trmfast.checkpoint import read
from trmfast.models import HRM, TRM, ACTLossHead, ACTModel

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head", [None, "stablemax_cross_entropy", "softmax_cross_entropy"])
def test_round_trip(name: str, head: str | None, tmp_path: Path) -> None:
    """Class, configuration, loss head, dtypes and every bit; no words needed, nothing drawn from the generator."""
    bare = make(name, forward_dtype="bfloat16", halt_max_steps=3)
    model = bare if head is None else ACTLossHead(bare, head)
    path = tmp_path / "model.safetensors"
    trmfast.save(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    drawn = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert type(loaded) is type(model)
    if head is not None:
        assert loaded.loss_fn is model.loss_fn
    found = getattr(loaded, "model", loaded)
    assert type(found) is type(bare)
    assert found.config == bare.config
    assert loaded.training
    assert same(loaded, model)
    trained = {key for key, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in model.named_parameters()}


def load(*arguments: Any, **options: Any) -> Any:
    """As trmfast.load; the class of what comes back is the caller's to know."""
    return trmfast.load(*arguments, **options)


def test_round_trip_of_what_was_changed_since_construction(tmp_path: Path) -> None:
    model = make("trm", backend="reference")
    model.H_cycles, model.L_cycles, model.window = 3, 1, 2
    model.halt_max_steps, model.halt_exploration_prob, model.backend = 7, 0.25, "reference"
    path = tmp_path / "model.safetensors"
    trmfast.save(cast(nn.Module, torch.compile(nn.DataParallel(model), backend="eager")), path)
    loaded = load(path)
    assert (loaded.H_cycles, loaded.L_cycles, loaded.window) == (3, 1, 2)
    assert (loaded.halt_max_steps, loaded.halt_exploration_prob, loaded.backend) == (7, 0.25, "auto")
    assert loaded.inner.program == model.inner.program
    assert load(path, H_cycles=5).inner.program.num_cycles == 5
    with pytest.raises(ValueError, match=r"^window: got 2, accepted are .* from 1 to 1$"):
        load(path, H_cycles=1)
    assert load(path, backend="reference", batch_size=5).puzzle_emb.local_weights.shape[0] == 5
    first = path.read_bytes()
    trmfast.save(loaded, path)  # over the file that it came from
    assert path.read_bytes() == first


def test_a_saved_file_is_plain_safetensors(tmp_path: Path) -> None:
    model = make("hrm")
    trmfast.save(ACTLossHead(model, "stablemax_cross_entropy"), tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors.keys() == model.state_dict().keys()


def test_a_loaded_model_does_not_lie_in_its_file(tmp_path: Path) -> None:
    """Mapped memory of a file that is cut afterwards would end the process."""
    path = tmp_path / "m.safetensors"
    trmfast.save(make("trm"), path)
    code = (
        "import pathlib, sys, trmfast; path = pathlib.Path(sys.argv[1]); model = trmfast.load(path); "
        "path.write_bytes(b''); assert all(p.isfinite().all() for p in model.parameters())"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(TRM):
        pass

    accepted = "accepted are TRM, TRMSingleZ, TRMHier6, HRM"
    for name in ("m", "m.pt", ".safetensors"):
        with pytest.raises(ValueError, match=f"^path: got .*{name}, accepted are files that end in .safetensors$"):
            trmfast.save(make("trm"), tmp_path / name)
    with pytest.raises(OSError, match=r"^path: got .*m\.safetensors, accepted are files that can be written: "):
        trmfast.save(make("trm"), tmp_path / "nowhere" / "m.safetensors")
    for model in (nn.Linear(2, 2), Mine(TINY)):
        with pytest.raises(TypeError, match=f"^model: got {type(model).__name__}, {accepted}"):
            trmfast.save(model, tmp_path / "m.safetensors")
    head = ACTLossHead(make("trm"), "stablemax_cross_entropy")
    head.loss_fn = lambda logits, *_: logits.sum(-1)
    with pytest.raises(ValueError, match=r"^model\.loss_fn: got .*accepted are stablemax"):
        trmfast.save(head, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- upstream's files


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["_orig_mod.model.", "model.", "module._orig_mod.model.", ""])
def test_upstream_pt(name: str, prefix: str, tmp_path: Path) -> None:
    model = make(name)
    path = tmp_path / "step_100"
    torch.save({prefix + key: tensor for key, tensor in model.state_dict().items()}, path)
    loaded = load(path, words(model), batch_size=3, no_ACT_continue=model.config.no_ACT_continue)
    assert type(loaded) is type(model)
    assert same(loaded, model)


def test_bare_inner_and_compiled_parts(tmp_path: Path) -> None:
    model = make("trm")
    for i, rename in enumerate(
        (
            lambda key: key.removeprefix("inner."),
            lambda key: key.replace("L_level.", "L_level._orig_mod."),
        )
    ):
        path = tmp_path / f"{i}.safetensors"
        save_file({rename(key): tensor for key, tensor in model.state_dict().items()}, path)
        assert same(load(path, **words(model)), model)


@pytest.mark.parametrize(
    "cls, config, told",
    [
        (TRM, SUDOKU, {"L_layers": 2, "mlp_t": False}),
        (TRM, SUDOKU | MLP, {"L_layers": 2, "mlp_t": True, "seq_len": 81, "puzzle_emb_len": 16}),
        (HRM, SUDOKU | {"H_layers": 4, "L_layers": 3}, {"H_layers": 4, "L_layers": 3}),
    ],
    ids=["attention", "mlp", "hrm"],
)
def test_published_sizes_are_told_by_the_tensors(
    cls: type[ACTModel], config: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"batch_size": 2, "halt_exploration_prob": 0.1}
    if cls is TRM:
        config["H_layers"] = 0
    path = tmp_path / "step_65100"
    torch.save({f"_orig_mod.model.{k}": t for k, t in cls(config).state_dict().items()}, path)
    found = read(path, {k: config[k] for k in (*UNTOLD, "num_heads", "pos_encodings", "seq_len")})
    sizes = {"hidden_size": 512, "vocab_size": 11, "puzzle_emb_ndim": 512, "num_puzzle_identifiers": 1}
    told = told | sizes | {"expansion": 4.0, "forward_dtype": "bfloat16"}
    assert told.items() <= found.told.items()
    made: Any = found.model
    assert made.config == cls.config_type.from_dict(config | {"batch_size": 1})


@pytest.mark.parametrize("name, expansion", [("trm", 3), ("trm", 20), ("trm-mlp_t", 12)])
def test_an_expansion_of_any_size_is_told_by_the_tensors(name: str, expansion: float, tmp_path: Path) -> None:
    """Another number may come out, the widths are the same."""
    model = make(name, expansion=expansion, hidden_size=96)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt", words(model)), model)


def test_all_config_beside_the_checkpoint(tmp_path: Path) -> None:
    """Upstream's training leaves its configuration there; only what comes from the data set is still asked for."""
    model = make("trm")
    torch.save({f"_orig_mod.model.{k}": t for k, t in model.state_dict().items()}, tmp_path / "step_9")
    arch = {k: v for k, v in TINY.items() if k not in ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers")}
    arch |= {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead"},
    }
    arch |= {"puzzle_emb_ndim": "${.hidden_size}", "vocab_size": None}  # neither says anything
    everything = {"arch": arch, "global_batch_size": 6, "lr": 1e-4, "project_name": None}
    (tmp_path / "all_config.yaml").write_text(json.dumps(everything))  # JSON is YAML
    with pytest.raises(ValueError, match=r"^config: got no seq_len, which do not follow from the tensors of TRM"):
        load(tmp_path / "step_9")
    loaded = load(tmp_path / "step_9", seq_len=6)
    assert loaded.config.batch_size == 6
    assert same(loaded, model)
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    assert same(load(tmp_path / "step_9", tmp_path / "arch.json", seq_len=6), model)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    model = make("trm", forward_dtype="float32")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", words(model), batch_size=3)
    losses = []
    for m in (model, loaded):
        head = ACTLossHead(m.train(), "stablemax_cross_entropy")
        batch = make_batch(0)
        torch.manual_seed(0)
        loss = head([], carry=head.initial_carry(batch), batch=batch)[1]
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert p.grad is not None, name
        assert torch.equal(p.grad, q.grad), name


def test_another_number_of_puzzles(tmp_path: Path) -> None:
    """As upstream's loader: every row is the mean of the file's."""
    model = make("trm")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", words(model), num_puzzle_identifiers=9)
    weights = loaded.puzzle_emb.weights
    assert weights.shape == (9, 32)
    torch.testing.assert_close(weights, model.puzzle_emb.weights.mean(0).expand(9, -1))
    assert same_but_puzzles(loaded, model)


def same_but_puzzles(a: nn.Module, b: nn.Module) -> bool:
    two = b.state_dict()
    return all(torch.equal(t, two[k]) for k, t in a.state_dict().items() if "puzzle_emb" not in k)


def test_device_and_dtype_are_the_callers_choice(tmp_path: Path) -> None:
    model = make("trm", forward_dtype="bfloat16")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", words(model), forward_dtype="float32", device="cpu")
    assert loaded.config.forward_dtype == "float32"
    assert loaded.inner.H_init.dtype == torch.bfloat16
    assert steps(loaded)[0].dtype == torch.float32


# ---------------------------------------------------------------- nano-trm


NANO = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_grid_size": 3, "H_cycles": 2, "L_cycles": 2,
    "N_supervision": 4, "N_supervision_val": 4, "ffn_expansion": 1, "learning_rate": 1e-4, "halt_exploration_prob": 0.1,
    "puzzle_emb_dim": 32, "puzzle_emb_len": 3, "rope_theta": 10000, "pos_emb_type": "1d", "use_mlp_t": False,
    "use_conv_swiglu": False, "use_board_swiglu": False, "vocab_size": 7, "num_puzzles": 5, "batch_size": 3,
    "pad_value": 0, "seq_len": 6, "output_dir": None, "forward_dtype": torch.float32,
}  # fmt: skip
NANO_NAMES = {"L_level": "lenet", "embed_tokens": "input_embedding", "H_init": "z_H_init", "L_init": "z_L_init"}


def nano(model: ACTModel) -> dict[str, Tensor]:
    """A state_dict as nano-trm writes it: other names, no inner module, a q_head with one output."""
    found = {}
    for key, tensor in model.inner.state_dict().items():
        first, dot, rest = key.partition(".")
        found[NANO_NAMES.get(first, first) + dot + rest] = tensor[:1] if first == "q_head" else tensor
    return found


@pytest.mark.parametrize("kind", ["attention", "mlp_t"])
@pytest.mark.parametrize("averaged", [False, True])
def test_nano_trm(kind: str, averaged: bool, tmp_path: Path) -> None:
    model = make("trm" if kind == "attention" else "trm-mlp_t", H_cycles=2)
    hyper = NANO if kind == "attention" else NANO | {"use_mlp_t": True, "pos_emb_type": "null"}
    tensors = nano(model)
    checkpoint: dict[str, Any] = {"epoch": 3, "state_dict": tensors, "hyper_parameters": hyper, "callbacks": {}}
    if averaged:  # what is in state_dict is then the raw weights
        checkpoint["callbacks"] = {"EMACallback": {"shadow": {k: t for k, t in tensors.items() if "_init" not in k}}}
        checkpoint["state_dict"] = {k: t if "_init" in k or "puzzle" in k else t + 1 for k, t in tensors.items()}
        del checkpoint["callbacks"]["EMACallback"]["shadow"]["puzzle_emb.weights"]
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint, path)
    loaded = load(path)
    assert type(loaded) is TRM
    assert loaded.config.batch_size == 3
    found = loaded.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(found[key][:1] if "q_head" in key else found[key], tensor[:1] if "q_head" in key else tensor)
    outputs = (steps(loaded)[i] for i in (0, 1, 3, 4))  # logits and q_halt of two steps
    expected = (steps(model)[i] for i in (0, 1, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert (found["inner.q_head.weight"][1] == 0).all()
    assert found["inner.q_head.bias"][1] == -5


def test_nano_trm_before_it_has_seen_its_data(tmp_path: Path) -> None:
    """What its hyper parameters then call 0 is told by the tensors, or is the default."""
    model = make("trm", H_cycles=2)
    hyper = NANO | {"vocab_size": 0, "num_puzzles": 0, "batch_size": 0}
    torch.save({"state_dict": nano(model), "hyper_parameters": hyper}, tmp_path / "last.ckpt")
    config: Any = load(tmp_path / "last.ckpt").config
    assert (config.vocab_size, config.num_puzzle_identifiers, config.batch_size) == (7, 5, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nano_trm_whose_dtype_is_left_to_it(dtype: str, tmp_path: Path) -> None:
    """Its constructor picks one for ``forward_dtype=None``, and its initial states have it."""
    model = make("trm", H_cycles=2, forward_dtype=dtype)
    torch.save({"state_dict": nano(model), "hyper_parameters": NANO | {"forward_dtype": None}}, tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt").config.forward_dtype == dtype


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"pos_emb_type": "2d"}, r"^pos_emb_type: got '2d', accepted are '1d' and none"),
        ({"use_conv_swiglu": True}, r"^use_conv_swiglu: got True, accepted is False"),
        ({"use_board_swiglu": True}, r"^use_board_swiglu: got True, accepted is False"),
    ],
)
def test_nano_trm_options_that_trm_lacks(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    torch.save({"state_dict": nano(make("trm")), "hyper_parameters": NANO | change}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=expected):
        load(tmp_path / "last.ckpt")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_weights_are_saved_as_they_are_read(tmp_path: Path) -> None:
    model: Any = make("trm")
    batch = make_batch(1)
    linear = model.inner.L_level.layers[0].mlp.down_proj
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    nn.utils.parametrizations.weight_norm(model.inner.L_level.layers[1].mlp.down_proj)
    path = tmp_path / "m.safetensors"
    trmfast.save(model, path)
    loaded = load(path)
    model.eval()
    loaded.eval()
    expected = model(model.initial_carry(batch), batch)[1]["logits"]
    assert torch.equal(loaded(loaded.initial_carry(batch), batch)[1]["logits"], expected)


def test_a_pruned_model_is_not_saved(tmp_path: Path) -> None:
    model: Any = make("trm")
    path = tmp_path / "m.safetensors"
    linear = model.inner.L_level.layers[0].mlp.down_proj
    torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.5)
    with pytest.raises(ValueError, match=r"^inner\.L_level\.layers\.0\.mlp\.down_proj: got an extra weight_") as caught:
        trmfast.save(model, path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    torch.nn.utils.prune.remove(linear, "weight")
    trmfast.save(model, path)
    assert torch.equal(load(path).inner.L_level.layers[0].mlp.down_proj.weight, linear.weight)
