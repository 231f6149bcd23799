"""Files that claim what no model has: load, convert and the runtime say so in one line, at once and without memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trmfast
from checkpoint_cases import make, same, saved
from trmfast import runtime
from trmfast.cli import main
from trmfast.config import MOST, MOST_UPDATES
from trmfast.file_format import LONGEST
from trmfast.models import HRM, TRM
from trmfast.targets import extension


def described() -> dict[str, Any]:
    config = vars(make("trm").config) | {"backend": "auto"}
    return {"version": 1, "model": "TRM", "config": config, "window": "last_cycle", "loss": None}


def write(path: Path, about: object, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(dict(make("trm").state_dict()) if tensors is None else tensors, path, metadata={"trmfast": text})
    return path


METADATA: list[tuple[object, str]] = [
    ("null", "is null, accepted is an object"),
    ("[1]", "is a list, accepted is an object"),
    ('"text"', "is a str, accepted is an object"),
    ("[" * 30000, "is not JSON: "),
    ("[" * 30000 + "]" * 30000, "is not JSON: "),
    (" " * (LONGEST + 1), f"has {LONGEST + 1} characters, accepted are up to {LONGEST}"),
    ({"version": True}, "is of format version True, this trmfast reads version 1"),
    ({"version": 1.0}, "is of format version 1.0, this"),
    ({"version": [1] * 999}, "is of format version [1, 1, 1"),
    ({"model": ["TRM"]}, "has a list as model, accepted are str"),
    ({"config": None}, "has null as config, accepted are dict"),
    ({"window": True}, "has a bool as window, accepted are str, int"),
    ({"window": {}}, "has a dict as window"),
    ({"loss": []}, "has a list as loss, accepted are str, null"),
    ({"loss": {"a": 1}}, "has a dict as loss"),
    ({"config": {"seq_len": [6]}}, "has a list as config['seq_len'], accepted are"),
]


def all_readers(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The messages of everything that reads a file, which are ValueError or TypeError and have one line."""
    messages = []
    readers: list[Any] = [trmfast.load, *([runtime.load] if extension is not None else [])]
    for reader in readers:
        with pytest.raises((ValueError, TypeError)) as error:
            reader(path)
        messages.append(str(error.value))
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(path), str(path.parent / "out.safetensors")])
    assert ended.value.code == 2
    messages.append(capsys.readouterr().err.strip())
    assert all("\n" not in message and len(message) < 600 for message in messages), messages
    return messages


@pytest.mark.parametrize("change, expected", METADATA, ids=range(len(METADATA)))
def test_metadata_of_another_kind(
    change: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = described() | change if isinstance(change, dict) else change
    for message in all_readers(write(tmp_path / "m.safetensors", about), capsys):
        assert expected in message


def test_a_long_name_of_a_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", described() | {"loss": "x" * 5000})
    with pytest.raises(ValueError, match=r"loss_type: got 'xxx.*accepted are stablemax") as error:
        trmfast.load(path)
    assert len(str(error.value)) < 600


NUMBERS = [
    ("seq_len", 200_000_000, f"integers up to {MOST['seq_len']}"),
    ("seq_len", 1e30, f"integers up to {MOST['seq_len']}"),
    ("seq_len", 10**4000, f"integers up to {MOST['seq_len']}"),
    ("seq_len", "6", "accepted is int"),
    ("batch_size", 200_000_000, f"integers up to {MOST['batch_size']}"),
    ("H_cycles", 10**7, "integers up to 1000000"),
    ("L_cycles", 10**6, f"at most {MOST_UPDATES} updates"),
    ("expansion", 1e30, "numbers up to 65536"),
    ("expansion", 10**400, "accepted is float"),
    ("expansion", float("inf"), "numbers up to 65536"),
    ("expansion", float("nan"), "positive numbers"),
    ("expansion", 60_000.0, "the configuration makes it"),
    ("rope_theta", 1e300, "numbers up to 1e+30"),
]


@pytest.mark.parametrize("name, value, expected", NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_have_limits(
    name: str, value: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = described()
    about["config"] |= {"pos_encodings": "rope", "mlp_t": False, "H_cycles": 20} | {name: value}
    path = write(tmp_path / "m.safetensors", about)
    start = time.process_time()
    messages = all_readers(path, capsys)
    assert all(expected in message for message in messages), messages
    assert time.process_time() - start < 5


def test_no_size_beyond_the_tensors_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = described()
    about["config"]["expansion"] = 60_000.0
    path = write(tmp_path / "m.safetensors", about)
    devices: list[str] = []
    whole = TRM.__init__

    def watched(self: TRM, *arguments: Any, **options: Any) -> None:
        devices.append(torch.empty(1).device.type)
        whole(self, *arguments, **options)

    monkeypatch.setattr(TRM, "__init__", watched)
    with pytest.raises(ValueError, match="the configuration makes it"):
        trmfast.load(path)
    assert devices == ["meta"]


def test_a_million_cycles_load_at_once(tmp_path: Path) -> None:
    about = described()
    about["config"]["H_cycles"] = 10**6
    path = write(tmp_path / "m.safetensors", about)
    start = time.process_time()
    assert trmfast.load(path).H_cycles == 10**6
    if extension is not None:
        assert runtime.load(path, threads=1).config.H_cycles == 10**6
    assert time.process_time() - start < 5


CHECKPOINTS: list[tuple[str, Any, str]] = [
    ("integers", lambda t: {n: v.to(torch.int32) for n, v in t.items()}, "accepted are dense tensors of real numbers"),
    ("sparse", lambda t: t | {"inner.lm_head.weight": t["inner.lm_head.weight"].to_sparse()}, "sparse_coo"),
    ("meta", lambda t: t | {"inner.lm_head.weight": t["inner.lm_head.weight"].to("meta")}, "on meta"),
    (
        "expanded",
        lambda t: t | {"inner.embed_tokens.embedding_weight": torch.zeros(1, 1).expand(10**9, 32)},
        "accepted are tensors that store each element",
    ),
    (
        "no columns",
        lambda t: t | {"inner.embed_tokens.embedding_weight": torch.zeros(7, 0)},
        "accepted are matrices with elements",
    ),
    ("two lines", lambda t: t | {"a\nb": torch.zeros(1)}, "accepted are names in one line"),
    (
        "no initial state",
        lambda t: {("inner.H_init.x" if n == "inner.H_init" else n): v for n, v in t.items()},
        "holds no H_init",
    ),
    (
        "callbacks",
        lambda t: {"state_dict": t, "callbacks": [1], "hyper_parameters": {"H_cycles": "x"}},
        "H_cycles: got",
    ),
    (
        "tensor as a number",
        lambda t: {"state_dict": t, "hyper_parameters": {"vocab_size": torch.ones(2), "seq_len": [1]}},
        "config: got no",
    ),
]


@pytest.mark.parametrize("name, change, expected", CHECKPOINTS, ids=[case[0] for case in CHECKPOINTS])
def test_tensors_of_another_kind(name: str, change: Any, expected: str, tmp_path: Path) -> None:
    path, known = saved(tmp_path, change)
    if name in ("callbacks", "tensor as a number"):
        known = {key: value for key, value in known.items() if key != "H_cycles"}
    with pytest.raises((ValueError, TypeError)) as error:
        trmfast.load(path, **known)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_nested_configuration_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, lambda _: None)
    for name in ("c.json", "c.yaml"):
        (tmp_path / name).write_text("[" * 3000 + "]" * 3000)
        with pytest.raises(ValueError, match=r"^config: .* is not (JSON|YAML) of plain data") as error:
            trmfast.load(path, tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, cls", [("trm", TRM), ("hrm", HRM)])
def test_good_files_load_as_before(name: str, cls: type, tmp_path: Path) -> None:
    model = make(name)
    trmfast.save(model, tmp_path / "m.safetensors")
    loaded = trmfast.load(tmp_path / "m.safetensors")
    assert type(loaded) is cls
    assert same(loaded, model)
