"""The report of ``first_gpu`` as Markdown: for the terminal, and for docs/gpu.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from trmfast.benchmark.rivals import TITLES, in_order, is_ours
from trmfast.benchmark.suites import title

__all__ = ["markdown"]

Found = dict[str, Any]


def markdown(record: Found) -> str:
    """A table of the steps, then what each kind of step found.

    Args:
        record: of first_gpu.json.
    """
    known, found = record["identity"], record["steps"]
    shown = [_line(name.split()[0], one) for name, one in found.items() if not one.get("late")]
    late = [one["title"] for one in found.values() if one.get("late")]
    lines = [
        f"{known['gpu']}; PyTorch {known['torch']}, Triton {known['triton']}, trmfast {known['trmfast']}, "
        f"source {known['source']}.",
        "",
        *_table(("step", "result", "seconds", "what"), shown, numbers=(2,)),
    ]
    if late:
        lines += ["", f"Not run for lack of time; the same command goes on with them: {'; '.join(late)}."]
    for heading, kind, show in SECTIONS:
        rows = [line for name, one in found.items() if name.split()[0] == kind and "rows" in one for line in show(one)]
        if rows:
            heads = HEADS[kind]
            numbers = [i for i, head in enumerate(heads) if head not in WORDS]
            lines += ["", heading, "", *_table(heads, rows, numbers)]
    remarks = [remark for one in found.values() for remark in one.get("remarks", ())]
    lines += ["", *(f"* {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines)


def _line(kind: str, one: Found) -> Sequence[str]:
    said = one.get("reason") or one.get("summary") or (SHORT[kind](one) if "rows" in one or "tools" in one else "")
    return (one["title"], one["status"], f"{one['seconds']:.0f}" if "seconds" in one else "", said)


def _short_environment(one: Found) -> str:
    here = [name for name, path in one["tools"].items() if path != "missing"]
    engines = [name for name, state in one["backends"].items() if state == "runs"]
    return f"{one['driver']}; backends: {', '.join(engines) or 'none'}; tools: {', '.join(here) or 'none'}"


def _short_small(one: Found) -> str:
    ran = [row for row in one["rows"] if not row["verdict"].startswith(("does not run", "refused"))]
    return f"{sum(row['verdict'].startswith('pass') for row in ran)} of {len(ran)} programs within the tolerance"


def _short_speed(one: Found) -> str:
    rows = [row for row in one["rows"] if row["implementation"] == "trmfast"]
    times = ", ".join(f"{row['step']} {row['seconds'] * 1e3:.3g} ms ({row['ratio']:.2f}x)" for row in rows)
    return f"{times}, as fast as the best rival"


def _short_engines(one: Found) -> str:
    return ", ".join(
        f"{row['backend']} {row['seconds'] * 1e3:.3g} ms" if "seconds" in row else f"{row['backend']} does not run"
        for row in one["rows"]
    )


def _short_model(one: Found) -> str:
    return f"measured over modelled: {_extent([row['seconds'] / row['modelled'] for row in one['rows']])}"


def _short_tiles(one: Found) -> str:
    gains = [row["seconds"][row["of the model"]] / row["seconds"][row["fastest"]] for row in one["rows"]]
    right = sum(row["of the model"] == row["fastest"] for row in one["rows"])
    return f"the model's tile is the fastest for {right} of {len(gains)}, the fastest gains up to {max(gains):.2f}x"


def _short_bytes(one: Found) -> str:
    return f"measured over counted: {_extent([row['bytes'] / row['counted'] for row in one['rows']])}"


def _extent(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}, median {statistics.median(values):.3g}"


SHORT: dict[str, Callable[[Found], str]] = {
    "environment": _short_environment,
    "small": _short_small,
    "speed": _short_speed,
    "engines": _short_engines,
    "model": _short_model,
    "tiles": _short_tiles,
    "bytes": _short_bytes,
}
"""What a kind of step found, in a few words."""


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
    ours = [(step, rows, name) for step, rows in groups.items() for name in in_order(rows) if is_ours(name)]
    for step, rows, name in ours:
        fused, setting = rows[name], "" if name == "trmfast" else f", {name}"
        model = one["modelled"][step if name == "trmfast" else name]
        times = [f"{rows[name]['seconds'] * 1e3:.3g}" if name in rows else "-" for name in ("eager", "compile")]
        eager = f"{rows['eager']['error']:.1e}" if "eager" in rows else "-"
        lines.append(
            (
                *(f"{title(fused['case'])}, B={fused['batch']}", f"{step}{setting}"),
                *(*times, f"{fused['seconds'] * 1e3:.3g}"),
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
            *(f"{row['seconds'] * 1e6:.3g}", f"{row['modelled'] * 1e6:.3g}"),
            f"{row['seconds'] / row['modelled']:.3g}",
            *(f"{row['bytes'] / row['seconds'] / 1e9:.0f}", f"{row['flops'] / row['seconds'] / 1e12:.1f}"),
        )
        for row in sorted(one["rows"], key=lambda row: -row["seconds"] * row["launches"])
    ]


def _tiles(one: Found) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = []
    for row in one["rows"]:
        best, chosen = row["fastest"], row["of the model"]
        times = [f"{seconds * 1e6:.3g}" for seconds in row["seconds"]]
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
    (
        "Published problems; milliseconds are medians, torch.compile runs as CUDA graphs, the peak is that of "
        "torch.mm in the same minute:",
        *("speed", _speed),
    ),
    ("Backends, forward:", "engines", _engines),
    ("Kernels in a CUDA graph of their like, beside the model of time (tiles with warps x stages):", "model", _model),
    ("Tiles: the model's choice and the fastest (warps x stages), from the largest to the smallest:", "tiles", _tiles),
    ("Memory traffic of a forward pass by Nsight Compute, caches emptied before each kernel:", "bytes", _bytes),
)
HEADS: dict[str, tuple[str, ...]] = {
    "small": ("backend", "program", "verdict"),
    "speed": (
        *("problem", "step", f"{TITLES['eager']} ms", f"{TITLES['compile']} ms", "trmfast ms"),
        *("as fast as the best", "of peak", "modelled ms", "counted GB/s", "error (eager's)", "policy"),
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
