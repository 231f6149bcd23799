"""Checkpoints: every form that people have, what the tensors tell, and files that describe themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trmfast
from model_cases import CASES, MLP, SUDOKU, TINY, make_batch, randomise
from trmfast.checkpoint import read
from trmfast.cli import main
from trmfast.models import HRM, TRM, ACTLossHead, ACTModel, TRMHier6, TRMSingleZ

pytestmark = pytest.mark.usefixtures("one_thread")

# What no tensor tells.
UNTOLD = ("H_cycles", "L_cycles", "halt_max_steps")


def make(name: str, **extra: Any) -> ACTModel:
    cls, _, differs, _ = CASES[name]
    torch.manual_seed(1)
    model = cls(TINY | differs | extra)
    randomise(model)
    return model


def words(model: ACTModel) -> dict[str, Any]:
    """The configuration keys that a caller has to give for a checkpoint of this model."""
    names = [*UNTOLD]
    if not model.config.mlp_t:
        names += ["num_heads"]
        if model.config.pos_encodings != "learned":
            names += ["pos_encodings", "seq_len"]
    if model.config.puzzle_emb_ndim and hasattr(model.config, "puzzle_emb_len"):
        names += ["puzzle_emb_len"]
    return {name: getattr(model.config, name) for name in names}


def steps(model: nn.Module) -> list[Tensor]:
    """Outputs of two supervision steps in evaluation."""
    bare: Any = getattr(model, "model", model)
    bare.eval()
    batch = make_batch(0)
    carry = bare.initial_carry(batch)
    found: list[Tensor] = []
    with torch.no_grad():
        for _ in range(2):
            carry, outputs = bare(carry=carry, batch=batch)
            found += outputs.values()
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors and the outputs are bitwise those of the other, dtypes included."""
    one, two = a.state_dict(), b.state_dict()
    tensors = one.keys() == two.keys() and all(
        t.dtype == two[k].dtype and torch.equal(t, two[k]) for k, t in one.items()
    )
    return tensors and all(torch.equal(t, u) for t, u in zip(steps(a), steps(b), strict=True))


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
    loaded = trmfast.load(path)
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


def test_round_trip_of_what_was_changed_since_construction(tmp_path: Path) -> None:
    model = make("trm")
    model.H_cycles, model.L_cycles, model.window = 3, 1, 2
    model.halt_max_steps, model.halt_exploration_prob, model.backend = 7, 0.25, "reference"
    path = tmp_path / "model.safetensors"
    trmfast.save(torch.compile(nn.DataParallel(model), backend="eager"), path)
    loaded = trmfast.load(path)
    assert (loaded.H_cycles, loaded.L_cycles, loaded.window) == (3, 1, 2)
    assert (loaded.halt_max_steps, loaded.halt_exploration_prob, loaded.backend) == (7, 0.25, "auto")
    assert loaded.inner.program == model.inner.program
    assert trmfast.load(path, H_cycles=5).inner.program.num_cycles == 5
    with pytest.raises(ValueError, match=r"^window: got 2, accepted are .* from 1 to 1$"):
        trmfast.load(path, H_cycles=1)
    assert trmfast.load(path, backend="reference", batch_size=5).puzzle_emb.local_weights.shape[0] == 5
    first = path.read_bytes()
    trmfast.save(loaded, path)  # over the file that it came from
    assert path.read_bytes() == first


def test_a_saved_file_is_plain_safetensors(tmp_path: Path) -> None:
    model = make("hrm")
    trmfast.save(ACTLossHead(model, "stablemax_cross_entropy"), tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors.keys() == model.state_dict().keys()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(TRM):
        pass

    accepted = "accepted are TRM, TRMSingleZ, TRMHier6, HRM"
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
    loaded = trmfast.load(path, words(model), batch_size=3, no_ACT_continue=model.config.no_ACT_continue)
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
        assert same(trmfast.load(path, **words(model)), model)


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


def test_all_config_beside_the_checkpoint(tmp_path: Path) -> None:
    """Upstream's training leaves its configuration there; only what comes from the data set is still asked for."""
    model = make("trm")
    torch.save({f"_orig_mod.model.{k}": t for k, t in model.state_dict().items()}, tmp_path / "step_9")
    arch = {k: v for k, v in TINY.items() if k not in ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers")}
    arch |= {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead"},
    }
    arch |= {"puzzle_emb_ndim": "${.hidden_size}"}
    everything = {"arch": arch, "global_batch_size": 6, "lr": 1e-4, "project_name": None}
    (tmp_path / "all_config.yaml").write_text(json.dumps(everything))  # JSON is YAML
    with pytest.raises(ValueError, match=r"^config: got no seq_len, which the tensors of TRM do not tell"):
        trmfast.load(tmp_path / "step_9")
    loaded = trmfast.load(tmp_path / "step_9", seq_len=6)
    assert loaded.config.batch_size == 6
    assert same(loaded, model)
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    assert same(trmfast.load(tmp_path / "step_9", tmp_path / "arch.json", seq_len=6), model)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    model = make("trm", forward_dtype="float32")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = trmfast.load(tmp_path / "m.pt", words(model), batch_size=3)
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
    loaded = trmfast.load(tmp_path / "m.pt", words(model), num_puzzle_identifiers=9)
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
    loaded = trmfast.load(tmp_path / "m.pt", words(model), forward_dtype="float32", device="cpu")
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
    loaded = trmfast.load(path)
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
        trmfast.load(tmp_path / "last.ckpt")


# ---------------------------------------------------------------- refusals


def saved(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str = "trm") -> tuple[Path, dict[str, Any]]:
    model = make(name)
    tensors = dict(model.state_dict())
    path = tmp_path / "m.pt"
    torch.save(change(tensors) or tensors, path)
    return path, words(model)


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["inner.lm_head.weight"]
        tensors["inner.extra"] = torch.zeros(2)

    path, known = saved(tmp_path, change)
    report = "missing: lm_head.weight; unexpected: extra"
    with pytest.raises(ValueError, match=f"^path: the tensors are not those of the model, {report}; accepted with"):
        trmfast.load(path, known)
    with pytest.warns(UserWarning, match=f"^tensors of the checkpoint: {report}$") as caught:
        loaded = trmfast.load(path, known, strict=False)
    assert caught[0].filename == __file__
    original = make("trm").state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, original[key]) == ("lm_head" not in key), key


def test_what_the_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    path, known = saved(tmp_path, lambda _: None)
    with pytest.raises(ValueError, match=r"^config: got no ") as error:
        trmfast.load(path)
    assert "seq_len, H_cycles, L_cycles, num_heads, pos_encodings, halt_max_steps" in str(error.value)
    assert "\n" not in str(error.value)
    for name in known.keys() - {"puzzle_emb_len"}:
        with pytest.raises(ValueError, match=f"^config: got no {name}, which"):
            trmfast.load(path, {k: v for k, v in known.items() if k != name})


@pytest.mark.parametrize(
    "words_, expected",
    [
        ({"hidden_size": 64}, r"^hidden_size: got 64, the tensors of the file say 32$"),
        ({"L_layers": 3}, r"^L_layers: got 3, the tensors of the file say 2$"),
        ({"mlp_t": True}, r"^mlp_t: got True, the tensors of the file say False$"),
        ({"expansion": 20}, r"^L_level\.layers\.0\.mlp\.gate_up_proj\.weight: got shape \[512, 32\], the config"),
        ({"num_heads": 5}, r"^L_level\.layers\.0\.self_attn\.qkv_proj\.weight: got shape \[96, 32\]"),
        ({"H_cycles": "many"}, r"^H_cycles: got 'many' \(str\), accepted is int$"),
        ({"pos_encodings": "learned"}, r"missing: embed_pos\.embedding_weight"),
    ],
)
def test_words_that_contradict_the_tensors(words_: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path, known = saved(tmp_path, lambda _: None)
    with pytest.raises((ValueError, TypeError), match=expected):
        trmfast.load(path, known | words_)


class Touch:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path, known = saved(tmp_path, lambda tensors: tensors | {"inner.extra": Touch(trap)})
    with pytest.raises(ValueError, match=r"^path: .*m\.pt is not a file of tensors and plain data alone") as error:
        trmfast.load(path, known)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trmfast.load(tmp_path / "nothing")
    cases: dict[str, tuple[Callable[[Path], Any], str]] = {
        "text": (lambda p: p.write_text("not a checkpoint at all"), "is not a file of tensors and plain data"),
        "empty": (lambda p: p.write_bytes(b""), "is not a file of tensors and plain data"),
        "cut": (lambda p: p.write_bytes(b"\x40\0\0\0\0\0\0\0{}"), "is not a whole safetensors file"),
        "list": (lambda p: torch.save([1, 2], p), "holds a list, accepted are dicts of tensors"),
        "numbers": (lambda p: torch.save({"lr": 1.0}, p), "holds float at 'lr', accepted are dicts of tensors"),
        "nobody": (lambda p: torch.save({}, p), "holds nothing, accepted"),
        "other": (
            lambda p: torch.save(nn.Linear(2, 2).state_dict(), p),
            "holds bias, weight, accepted are the tensors of TRM, TRMSingleZ, TRMHier6, HRM",
        ),
        "twice": (
            lambda p: torch.save({"a.b": torch.zeros(1), "model.a.b": torch.zeros(1)}, p),
            "holds a.b twice, under different prefixes",
        ),
    }
    for name, (write, expected) in cases.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"^path: .*{expected}") as error:
            trmfast.load(tmp_path / name)
        assert "\n" not in str(error.value), name


def test_metadata_of_another_format_or_model(tmp_path: Path) -> None:
    model = make("trm")
    path = tmp_path / "m.safetensors"
    described: dict[str, Any] = {"version": 1, "model": "HRM", "config": {}, "window": "all", "loss": None}
    for change, expected in (
        ({}, "the tensors are those of TRM, the metadata says HRM"),
        ({"version": 2}, "is of format version 2, this trmfast reads version 1"),
        ({"version": None}, "is of format version None"),
    ):
        save_file(model.state_dict(), path, metadata={"trmfast": json.dumps(described | change)})
        with pytest.raises(ValueError, match=f"^path: .*{expected}"):
            trmfast.load(path)
    del described["config"]
    save_file(model.state_dict(), path, metadata={"trmfast": json.dumps(described)})
    with pytest.raises(ValueError, match=r"^path: the metadata of .* has no config$"):
        trmfast.load(path)


def test_bad_config_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, lambda _: None)
    for text, expected in (("[1, 2]", "got list, accepted are dicts"), ("a: !!python/name:os.system", "is not YAML")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"^config: .*{expected}") as error:
            trmfast.load(path, tmp_path / "c.yaml")
        assert "\n" not in str(error.value)


def test_import_brings_no_safetensors() -> None:
    code = "import sys, trmfast; assert 'safetensors' not in sys.modules; assert callable(trmfast.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the command


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make("trm_singlez")
    torch.save({f"_orig_mod.model.{k}": t for k, t in model.state_dict().items()}, tmp_path / "step_1")
    out = tmp_path / "out.safetensors"
    options = [f"{key}={value}" for key, value in words(model).items()]
    assert main(["convert", str(tmp_path / "step_1"), str(out), "--set", *options]) == 0
    text = capsys.readouterr().out
    assert "TRMSingleZ: " in text
    assert "PyTorch state_dict" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["hidden_size"] == ["32", "tensors"]
    assert rows["H_cycles"] == ["2"]
    loaded = trmfast.load(out)
    assert type(loaded) is TRMSingleZ
    assert same(loaded, model)
    # Once more, from the file that describes itself.
    again = tmp_path / "again.safetensors"
    assert main(["convert", str(out), str(again), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "TRMSingleZ"
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert again.read_bytes() == out.read_bytes()


def test_convert_partial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, known = saved(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if "lm_head" not in k}, "trm_hier6")
    out = tmp_path / "out.safetensors"
    options = ["--set", *(f"{key}={value}" for key, value in known.items())]
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(path), str(out), *options])
    assert ended.value.code == 2
    assert not out.exists()
    assert main(["convert", str(path), str(out), "--partial", *options]) == 0
    assert "missing: lm_head.weight" in capsys.readouterr().out
    assert type(trmfast.load(out)) is TRMHier6


@pytest.mark.parametrize(
    "words_, expected",
    [
        (["nothing.pt", "out"], "nothing.pt"),
        (["{}", "out"], "config: got no seq_len"),
        (["{}", "out", "--set", "H_cycles"], "--set: got 'H_cycles', accepted are KEY=VALUE"),
        (["{}", "out", "--set", "strict=1"], "--set: got 'strict', accepted are configuration keys"),
        (["{}", "out", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_convert_errors_are_one_line(
    words_: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = saved(tmp_path, lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main(["convert", *(word.format(path) for word in words_)])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert expected in err
