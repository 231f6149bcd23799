"""The README's examples run as they are printed, and its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dropin_cases import TINY, make_batch
from dropin_models import TRM
from dropin_models.head import ACTLossHead

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def execute(example: str, **names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_swap_in() -> None:
    found = execute(EXAMPLES[0])
    assert torch.isfinite(found["loss"])
    gradients = [p.grad for name, p in found["model"].named_parameters() if "L_level" in name]
    assert len(gradients) == 8
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients)


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With models of the same structure in the place of the published ones, under the names of their modules."""

    class Head(ACTLossHead):
        def forward(self, _keys: list[str], **data: Any) -> tuple[Any, ...]:  # type: ignore[override]
            carry, loss, done = super().forward(**data)
            return carry, loss, {}, {}, done

    contents: dict[str, dict[str, Any]] = {
        "models": {},
        "models.losses": {"ACTLossHead": lambda model, _loss: Head(model)},
        "models.recursive_reasoning": {},
        "models.recursive_reasoning.trm": {"TinyRecursiveReasoningModel_ACTV1": TRM},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    config = TINY | {"batch_size": 4}
    found = execute(EXAMPLES[1], config=config, batch=make_batch("trm"))
    assert torch.isfinite(found["loss"])
    assert all(p.grad is not None for name, p in found["model"].named_parameters() if "L_level" in name)


def test_solver(capsys: pytest.CaptureFixture[str]) -> None:
    execute(EXAMPLES[2])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(row[0]) for row in rows] == list(range(8))
    assert all(1 <= int(row[1]) <= 16 for row in rows)
    # The default rule halts a row whose confidence exceeds a half.
    assert any(int(row[1]) < 16 for row in rows)
    assert all(float(row[2]) > 0.5 for row in rows if int(row[1]) < 16)


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    found = execute(EXAMPLES[3])
    assert found["z_H"].shape == (2, 81, 128)
    assert found["z_H"].isfinite().all()
    assert "z_H <- f(z_H + z_L)" in capsys.readouterr().out


def test_random_depth() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
    found = execute(example)
    assert found["out"].isfinite().all()
    assert all(p.grad is not None and p.grad.any() for p in found["core"].parameters())


def test_every_example_is_tested() -> None:
    assert len(EXAMPLES) == 4


def test_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert not missing
