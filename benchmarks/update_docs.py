"""Puts a finished suite into docs/benchmarks.md: ``python benchmarks/update_docs.py FOLDER``.

The tables replace what stands between the markers ``<!-- suite -->`` and ``<!-- /suite -->``; the charts in docs/images
are redrawn from suite.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trmfast.benchmark.charts import write_charts
from trmfast.benchmark.report import load, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- suite -->", "<!-- /suite -->"


def main(folder: Path) -> None:
    report = load(folder / "suite.json")
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}")
    print(f"{page}; {', '.join(write_charts(DOCS / 'images', report))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
