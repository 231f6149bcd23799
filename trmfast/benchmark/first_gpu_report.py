"""The report of ``first_gpu`` as Markdown: for the terminal, and for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trmfast.benchmark.rivals import TITLES
from trmfast.benchmark.suites import title

__all__ = ["markdown"]

Found = dict[str, Any]


def markdown(record: Found) -> str:
    """A table of the steps, then what each kind of step found.

    Args:
        record: of first_gpu.json.
    """
    known, found = record["identity"], record["steps"]
    lines = [
        f"{known['gpu']}; PyTorch {known['torch']}, Triton {known['triton']}, trmfast {known['trmfast']}, "
        f"source {known['source']}.",
        "",
        *_table(("step", "result", "seconds", "what"), [_line(one) for one in found.values()], numbers=(2,)),
    ]
    for heading, kind, show in SECTIONS:
        shown = [line for name, one in found.items() if name.split()[0] == kind and "rows" in one for line in show(one)]
        if shown:
            heads = HEADS[kind]
            numbers = [i for i, head in enumerate(heads) if head not in WORDS]
            lines += ["", heading, "", *_table(heads, shown, numbers)]
    remarks = [remark for one in found.values() for remark in one.get("remarks", ())]
    lines += ["", *(f"* {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines)


def _line(one: Found) -> Sequence[str]:
    said = one.get("reason") or one.get("summary") or _short(one)
    return (one["title"], one["status"], f"{one['seconds']:.0f}" if "seconds" in one else "", said)


def _short(one: Found) -> str:
    if "tools" in one:
        here = [name for name, path in one["tools"].items() if path != "missing"]
        engines = [name for name, state in one["backends"].items() if state == "runs"]
        return f"{one['driver']}; backends: {', '.join(engines) or 'none'}; tools: {', '.join(here) or 'none'}"
    return f"{len(one['rows'])} rows" if "rows" in one else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    rule = (" ---: " if i in numbers else " --- " for i in range(len(heads)))
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


# ---------------------------------------------------------------- what steps found


def _small(one: Found) -> list[Sequence[str]]:
    return [(row["backend"], row["case"], row["verdict"]) for row in one["rows"]]


def _speed(one: Found) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    groups: dict[str, dict[str, Found]] = {}
    for row in one["rows"]:
        groups.setdefault(row["step"], {})[row["implementation"]] = row
    for step, rows in groups.items():
        fused, model = rows["trmfast"], one["modelled"][step]
        times = [f"{rows[name]['seconds'] * 1e3:.3g}" if name in rows else "-" for name in ("eager", "compile")]
        eager = f"{rows['eager']['error']:.1e}" if "eager" in rows else "-"
        lines.append(
            (
                *(f"{title(fused['case'])}, B={fused['batch']}", step, *times, f"{fused['seconds'] * 1e3:.3g}"),
                *(f"{fused['ratio']:.2f}x", f"{fused['share']:.0%}", f"{model['seconds'] * 1e3:.3g}"),
                *(f"{model['bytes'] / fused['seconds'] / 1e9:.0f}", f"{fused['error']:.1e} ({eager})"),
                fused["verdict"].split(":")[0],
            )
        )
    return lines


def _engines(one: Found) -> list[Sequence[str]]:
    return [
        (
            *(f"{title(row['case'])}, B={row['batch']}", row["backend"]),
            f"{row['seconds'] * 1e3:.3g}" if "seconds" in row else row["reason"],
            "-" if row["modelled"] is None else f"{row['modelled'] * 1e3:.3g}",
        )
        for row in one["rows"]
    ]


def _model(one: Found) -> list[Sequence[str]]:
    return [
        (
            *(row["kernel"], row["tile"], str(row["launches"]), str(row["programs"])),
            *(f"{row['seconds'] * 1e6:.1f}", f"{row['modelled'] * 1e6:.1f}"),
            f"{row['seconds'] / row['modelled']:.2f}",
            *(f"{row['bytes'] / row['seconds'] / 1e9:.0f}", f"{row['flops'] / row['seconds'] / 1e12:.1f}"),
        )
        for row in sorted(one["rows"], key=lambda row: -row["seconds"] * row["launches"])
    ]


def _tiles(one: Found) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    for row in one["rows"]:
        best, chosen = row["fastest"], row["of the model"]
        times = [f"{seconds * 1e6:.1f}" for seconds in row["seconds"]]
        gain = row["seconds"][chosen] / row["seconds"][best]
        lines.append((row["kernel"], row["tiles"][chosen], row["tiles"][best], " / ".join(times), f"{gain:.2f}x"))
    return lines


def _bytes(one: Found) -> list[Sequence[str]]:
    return [
        (
            *(row["kernel"], str(row["launches"]), f"{row['bytes'] / 1e6:.2f}", f"{row['counted'] / 1e6:.2f}"),
            f"{row['bytes'] / row['counted']:.2f}",
        )
        for row in one["rows"]
    ]


SECTIONS: tuple[tuple[str, str, Callable[[Found], list[Sequence[str]]]], ...] = (
    ("Small programs, forward and all gradients against float64:", "small", _small),
    ("Published problems; milliseconds are medians, torch.compile runs as CUDA graphs:", "speed", _speed),
    ("Backends, forward:", "engines", _engines),
    ("Kernels in a CUDA graph of their like, beside the model of time:", "model", _model),
    ("Tiles: the model's choice and the fastest:", "tiles", _tiles),
    ("Memory traffic of a forward pass by Nsight Compute, caches emptied before each kernel:", "bytes", _bytes),
)
HEADS: dict[str, tuple[str, ...]] = {
    "small": ("backend", "program", "verdict"),
    "speed": (
        *("problem", "step", f"{TITLES['eager']} ms", f"{TITLES['compile']} ms", "trmfast ms"),
        *("faster than the best", "of peak", "modelled ms", "counted GB/s", "error (eager's)", "policy"),
    ),
    "engines": ("problem", "backend", "ms", "modelled ms"),
    "model": (
        *("kernel", "tile", "launches", "programs", "us", "modelled us"),
        *("measured / modelled", "counted GB/s", "TFLOP/s"),
    ),
    "tiles": ("kernel", "the model's tile", "the fastest tile", "us of each", "gain"),
    "bytes": ("kernel", "launches", "MB", "counted MB", "measured / counted"),
}
WORDS = {
    *("backend", "program", "verdict", "problem", "step", "policy", "kernel", "tile"),
    *("the model's tile", "the fastest tile", "us of each"),
}
