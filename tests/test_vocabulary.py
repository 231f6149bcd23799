"""One word for one thing: the table of docs/ARCHITECTURE.md against the tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "ARCHITECTURE.md"
FOLDERS = ("trmfast", "kernels", "csrc", "tests", "docs", "benchmarks")
SUFFIXES = (".py", ".md", ".h", ".cuh", ".cu", ".cpp")


def rows() -> list[tuple[str, str]]:
    """First and last column of the table."""
    text = TABLE.read_text().split("## Words")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 for row in cells), "a row of the table has other than three columns"
    return [(first, last) for first, _, last in cells]


WORDS = [word for first, _ in rows() for word in re.findall(r"`(\w+)`", first)]
RETIRED = {
    word: tuple(folders.split(", ")) if folders else FOLDERS
    for _, last in rows()
    for word, folders in re.findall(r"`(\w+)`(?: in ([\w/, ]*\w))?", last)
}
CLASSES = [word for word in WORDS if word[0].isupper()]


def files(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        assert (root / folder).is_dir(), f"{folder} is no folder"
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in SUFFIXES and file != TABLE:
                yield file


@cache
def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def found(pattern: str, root: Path, folders: tuple[str, ...]) -> list[str]:
    """Where a pattern is, as file:line."""
    matches = re.compile(pattern).search
    return [
        f"{file.relative_to(root)}:{number}"
        for file in files(root, folders)
        for number, line in enumerate(lines(file), 1)
        if matches(line)
    ]


def test_a_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("hidden_size = 1\nhidden = 2\n")
    assert found(r"\bhidden\b", tmp_path, ("kernels",)) == ["kernels/a.py:2"]
    assert "hidden" in RETIRED
    assert {"Plan", "Configuration", "Compiled"} <= set(CLASSES)


@pytest.mark.parametrize("word", RETIRED)
def test_retired_word_is_gone(word: str) -> None:
    assert found(rf"\b{word}\b", ROOT, RETIRED[word]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_defined_once(name: str) -> None:
    definition = rf"^\s*(template <.*> )?(class|struct) {name}\b(?!;)"
    places = found(definition, ROOT, ("trmfast", "kernels", "csrc", "benchmarks"))
    if re.search(definition, (ROOT / "setup.py").read_text(), re.MULTILINE):
        places.append("setup.py")
    assert len(places) == 1, f"{name}: {places}"
