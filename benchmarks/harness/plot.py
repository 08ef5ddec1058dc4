"""Rows of the quality benchmark → a plot of size against right answers and answer loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, GRID = "#7d8590", "#7d859055"  # grey that is readable on white and on near-black
COLOURS = {"exact": "#d9822b", "int8": "#3b82f6"}
MARKERS = {"exact": "s", "int8": "o"}

Box = tuple[float, float, float, float]


def plot_quality(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot; the background is transparent, so that it suits light and dark pages.

    Raises
    ------
    SystemExit
        When matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("The plot needs matplotlib, which is in the extra [bench].") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    style: Any = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "font.size": 10,
        "svg.fonttype": "path",  # looks the same everywhere
        "svg.hashsalt": "edge-runtime",
    }
    panels: tuple[tuple[str, float, str], ...] = (
        ("average", 100.0, "right answers, average of the skills, %"),
        ("loss", 1.0, "answer loss, nats per token (lower is better)"),
    )
    if all("kl" in row for row in rows):  # older results lack it
        panels += (("kl", 1.0, "KL divergence from float32, nats per token (lower is better)"),)
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 6), layout="constrained")
        for axis, (key, factor, label) in zip(axes, panels, strict=True):
            points = [(row["bytes"] / 1e6, row[key] * factor, row) for row in rows]
            for x, y, row in points:
                arithmetic = row.get("arithmetic", "int8")
                axis.plot(x, y, MARKERS[arithmetic], color=COLOURS[arithmetic], markersize=7, label=arithmetic)
            for x in {x for x, _, _ in points}:
                for vision in {row["vision"] for at, _, row in points if at == x}:
                    heights = [y for at, y, row in points if at == x and row["vision"] == vision]
                    axis.plot([x, x], [min(heights), max(heights)], color=INK, linewidth=1, zorder=1)
            axis.set_xlabel("decoder and vision file together, MB")
            axis.set_ylabel(label)
            axis.grid(True, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.14, y=0.1)
            figure.canvas.draw()
            _label(axis, points)
        handles = {text: handle for handle, text in zip(*axes[0].get_legend_handles_labels(), strict=True)}
        names = {"int8": "vision tower in int8 (default)", "exact": "vision tower in float32 (--exact)"}
        figure.legend(
            handles.values(),
            [names[text] for text in handles],
            loc="outside upper center",
            ncols=2,
            frameon=False,
            labelcolor=INK,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, dpi=150, metadata=metadata)
        pyplot.close(figure)


def _label(axis: Any, points: Sequence[tuple[float, float, dict[str, Any]]]) -> None:
    """Label each pair of types once, at the nearest place beside its points where the label covers nothing."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    places: dict[str, list[tuple[float, float]]] = {}
    for x, y, row in points:
        name = f"{row['decoder']} + {row['vision']}"
        places.setdefault(name, []).append(((x - left) / (right - left), (y - bottom) / (top - bottom)))
    # Boxes as fractions of the axes: (left, bottom, right, top).
    taken = [(x - 0.014, y - 0.02, x + 0.014, y + 0.02) for own in places.values() for x, y in own]
    for own in places.values():
        heights = [height for _, height in own]
        taken.append((own[0][0] - 0.003, min(heights), own[0][0] + 0.003, max(heights)))
    for name, own in sorted(places.items(), key=lambda item: -item[1][0][0]):
        x, y = own[0][0], sum(height for _, height in own) / len(own)
        wide = 0.0125 * len(name) + 0.01
        box = _free_box(x, y, wide, taken)
        taken.append(box)
        near = max(abs(box[0] - x), abs(box[2] - x)) < wide + 0.04 and box[1] - 0.02 < y < box[3] + 0.02
        axis.annotate(
            name,
            (x, y),
            ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops=None if near else {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkB": 4},
        )


def _free_box(x: float, y: float, wide: float, taken: Sequence[Box], high: float = 0.042) -> Box:
    """Box of that size inside the axes, nearest to a point and clear of `taken`; beside the point if none is free."""
    steps = [n / 50 for n in range(-50, 51)]
    candidates = sorted(
        ((abs(dx) + 1.5 * abs(dy), x + dx, y + dy) for dx in steps for dy in steps),
        key=lambda candidate: candidate[0],
    )
    for _, u, v in candidates:
        box = (u - wide / 2, v - high / 2, u + wide / 2, v + high / 2)
        inside = box[0] >= 0 and box[1] >= 0 and box[2] <= 1 and box[3] <= 1
        if inside and all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
            return box
    return (x, y - high / 2, x + wide, y + high / 2)
