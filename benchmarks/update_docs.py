"""Puts finished runs into the documentation: ``python benchmarks/update_docs.py FOLDER``.

Tables replace what stands between markers: of a suite (suite.json) ``<!-- suite -->`` in docs/benchmarks.md, whose
charts in docs/images are redrawn; of the first day on a GPU (first_gpu.json) ``<!-- measured -->`` in docs/gpu.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trmfast.benchmark.charts import write_charts
from trmfast.benchmark.first_gpu_report import markdown as first_gpu_markdown
from trmfast.benchmark.report import load, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(folder: Path) -> None:
    if (folder / "first_gpu.json").exists():
        replace(DOCS / "gpu.md", "measured", first_gpu_markdown(json.loads((folder / "first_gpu.json").read_text())))
        return
    report = load(folder / "suite.json")
    replace(DOCS / "benchmarks.md", "suite", markdown(report))
    print(", ".join(write_charts(DOCS / "images", report)))


def replace(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of a name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
