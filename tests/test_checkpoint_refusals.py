"""Files that are no checkpoint of a model, words that contradict one, and the command that converts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import trmfast
from checkpoint_cases import make, same, saved, words
from trmfast.cli import main
from trmfast.models import TRMHier6, TRMSingleZ

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("rows", [0, -1, 2.5, "many"])
def test_a_number_of_puzzles_that_is_none(rows: Any, tmp_path: Path) -> None:
    path, known = saved(tmp_path, lambda _: None)
    with pytest.raises(ValueError, match=f"^num_puzzle_identifiers: got {rows!r}, the tensors of the file say 5$"):
        trmfast.load(path, known, num_puzzle_identifiers=rows)


@pytest.mark.parametrize(
    "length, expected",
    [
        (9, r"^seq_len: got 9, accepted are 1 to 8, the tensors are those of 9 positions$"),
        (0, r"^seq_len: got 0, accepted are 1 to 8, "),
        ("many", r"^seq_len: got 'many' \(str\), accepted is int$"),
    ],
)
def test_a_length_that_the_tensors_do_not_have(length: Any, expected: str, tmp_path: Path) -> None:
    """The MLP over the sequence tells the number of positions, puzzle tokens and all."""
    path, known = saved(tmp_path, lambda _: None, "trm-mlp_t")
    del known["puzzle_emb_len"]
    with pytest.raises((ValueError, TypeError), match=expected):
        trmfast.load(path, known | {"seq_len": length})


PLAIN = "accepted are safetensors files and PyTorch checkpoints of tensors and plain data"


class Touch:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path, known = saved(tmp_path, lambda tensors: tensors | {"inner.extra": Touch(trap)})
    with pytest.raises(ValueError, match=f"^path: got .*m.pt, {PLAIN}$") as error:
        trmfast.load(path, known)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    unreadable = "accepted are files that can be read: "
    with pytest.raises(FileNotFoundError, match=f"^path: got .*nothing, {unreadable}No such file"):
        trmfast.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match=f"^path: got {tmp_path}, {unreadable}Is a directory$"):
        trmfast.load(tmp_path)
    cases: dict[str, tuple[Callable[[Path], Any], str]] = {
        "text": (lambda p: p.write_text("not a checkpoint at all"), f"got .*text, {PLAIN}$"),
        "empty": (lambda p: p.write_bytes(b""), f"got .*empty, {PLAIN}$"),
        "damaged": (lambda p: p.write_bytes(b"\x80\x02h\x07."), f"got .*damaged, {PLAIN}$"),
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
    save_file(model.state_dict(), path, metadata={"trmfast": "not JSON"})
    with pytest.raises(ValueError, match=r"^path: the metadata of .* is not JSON: "):
        trmfast.load(path)
    del described["config"]
    save_file(model.state_dict(), path, metadata={"trmfast": json.dumps(described)})
    with pytest.raises(ValueError, match=r"^path: the metadata of .* has no config$"):
        trmfast.load(path)


def test_bad_config_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, lambda _: None)
    for missing in ("c.yaml", "c.json"):
        with pytest.raises(FileNotFoundError, match=f"^config: got .*{missing}, accepted are .*: No such file"):
            trmfast.load(path, tmp_path / missing)
    for name, content, expected in (
        ("c.yaml", b"[1, 2]", "got list, accepted are dicts"),
        ("c.yaml", b"a: !!python/name:os.system", r"c\.yaml is not YAML of plain data: could not"),
        ("c.yaml", b"\xff\xfe", r"c\.yaml is not YAML of plain data: 'utf-8' codec"),
        ("c.json", b'{"a": ', r"c\.json is not JSON of plain data: Expecting value"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^config: .*{expected}") as error:
            trmfast.load(path, tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.breadth
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


OUT = "out.safetensors"  # never written


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
        (["nothing.pt", OUT], "IN: got nothing.pt, accepted are files that can be read: No such file or directory"),
        (["{folder}", OUT], "IN: got {folder}, accepted are files that can be read: Is a directory"),
        ([__file__, OUT], f"IN: got {__file__}, {PLAIN} ("),
        (["{path}", OUT], "--config: got no seq_len"),
        (["{path}", OUT, "--set", "H_cycles"], "--set: got 'H_cycles', accepted are KEY=VALUE"),
        (["{path}", OUT, "--set", "strict=1"], "--set: got 'strict', accepted are configuration keys"),
        (["{path}", OUT, "--config", "nowhere.yaml"], "--config: got nowhere.yaml, accepted are files that can be"),
        (["{path}", "{path}"], "OUT: got {path}, accepted are files that end in .safetensors"),
        (
            ["{saved}", "{folder}/../{folder.name}/saved.safetensors"],
            "OUT: got {folder}/../{folder.name}/saved.safetensors, accepted are other files",
        ),
        (["{saved}", "{folder}/nowhere/out.safetensors"], "OUT: got {folder}/nowhere/out.safetensors, accepted are"),
    ],
)
def test_convert_errors_are_one_line(
    words_: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = saved(tmp_path, lambda _: None)
    names = {"path": path, "saved": tmp_path / "saved.safetensors", "folder": tmp_path}
    trmfast.save(make("trm"), names["saved"])
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        main(["convert", *(word.format(**names) for word in words_)])
    assert ended.value.code == 2
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert f"trmfast convert: {expected.format(**names)}" in err
