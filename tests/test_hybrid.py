"""The example with foreign features, on a random frozen encoder and a smaller head."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

PATH = Path(__file__).parents[1] / "docs" / "examples" / "hybrid.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def hybrid() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hybrid", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hybrid"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def random_encoder(sentences: list[str]) -> Tensor:
    """A random vector for each word, [sentences, words + 2, 32]; as MiniLM, with a token before and after the words."""
    words = sorted({word for sentence in sentences for word in sentence.split()})
    table = torch.randn(len(words) + 2, 32, generator=torch.Generator().manual_seed(0))
    rows = [[len(words), *(words.index(word) for word in s.split()), len(words) + 1] for s in sentences]
    return table[torch.tensor(rows)]


def test_stories(hybrid: ModuleType) -> None:
    """Answers and distances are those of the texts, and pairs kept from training are in the others."""
    pairs = []
    for new_pairs in (False, True):
        stories = hybrid.make_stories(60, 9, seed=3, new_pairs=new_pairs)
        seen = set()
        for n in range(60):
            says = {}
            for sentence in stories.text(n).split(" . "):
                person, verb, _, last = sentence.removesuffix(" .").split()
                says[person] = (verb, last)
                if verb == "agrees":
                    seen.add((person, last))
            assert len(says) == 9
            for person, colour, hops in zip(says, stories.colours[n].tolist(), stories.hops[n].tolist(), strict=True):
                verb, last = says[person]
                for _ in range(hops):
                    assert verb == "agrees"
                    verb, last = says[last]
                assert (verb, last) == ("likes", hybrid.COLOURS[colour])
        pairs.append(seen)
    assert pairs[1] - pairs[0]


@pytest.mark.breadth
def test_the_heads_learn(hybrid: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of the example's training: enough to leave the linear layer, which cannot follow references, behind."""
    found = hybrid.compare(random_encoder, people=6, steps=150, stories=1000, hidden_size=64)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == list(found)
    for line in lines[-3:]:
        first, last = (float(word) for word in line.split(" -> ")[0].split()[-1:] + line.split(" -> ")[1].split()[:1])
        assert last < first
    assert found["linear"] < 0.6
    assert found["one application"] > found["linear"] + 0.1
    assert found["recursion"] > found["linear"] + 0.2
