"""The picture of a run: GFLOP/s of every implementation, one panel for the forward step, one for training."""

from __future__ import annotations

from pathlib import Path

from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import IMPLEMENTATIONS, OURS, STEPS
from trmfast.benchmark.report import Report

__all__ = ["write_chart"]

COLOURS = {"eager": "#b8bcc2", "compile": "#7b8a9c", "trmfast": "#1f4e79", "kept": "#5b8fc0"}
TITLES = {"forward": "One supervision step, forward", "training": "One training step"}


def write_chart(path: Path, report: Report) -> None:
    """Draws the chart.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = report.groups()
    configs = list(dict.fromkeys(config for config, _, _ in groups))
    names = [name for name in IMPLEMENTATIONS if any(name in group for _, _, group in groups)]
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.2), sharey=True, layout="constrained")
    for axis, step in zip(axes, STEPS, strict=True):
        found = {config: group for config, s, group in groups if s == step}
        for i, name in enumerate(names):
            for position, config in enumerate(configs):
                m = found[config].get(name)
                if m is None:
                    continue
                x = position + (i - (len(names) - 1) / 2) * width
                axis.bar(
                    x,
                    m.gflops,
                    width * 0.94,
                    color=COLOURS[name],
                    label=IMPLEMENTATIONS[name] if position == 0 else None,
                )
                bold = "bold" if name in OURS else "normal"
                axis.annotate(
                    f"{m.ratio:.2f}x",
                    (x, m.gflops),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    fontweight=bold,
                )
        labels = [
            f"{CONFIGS[c].title.replace(', ', chr(10))}\nB={found[c]['trmfast'].batch}, L={found[c]['trmfast'].length}"
            for c in configs
        ]
        axis.set_xticks(range(len(configs)), labels, fontsize=9)
        axis.set_title(TITLES[step], fontsize=12)
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.margins(y=0.12)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("GFLOP/s (higher is better)")
    handles, texts = axes[1].get_legend_handles_labels()  # training has every implementation
    figure.legend(handles, texts, loc="outside lower center", ncols=len(names), frameon=False)
    threads = report.facts["settings"]["threads"]
    peak = max(m.peak for m in report.measurements)
    figure.suptitle(
        f"{report.machine}; {threads} threads, bf16, PyTorch {report.facts['versions']['torch']}\n"
        f"on each bar: speed relative to the faster rival; matrix peak {peak:.0f} GFLOP/s ({report.peak_source})",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
