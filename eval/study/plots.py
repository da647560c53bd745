"""Plots of a study's results.

Knows the form of eval/results/*.json; reads none of them.
"""

from pathlib import Path
from typing import Any

from tables import COMPARED, shown_metrics


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots the paired differences to the reference, which is ahead left of 0 for NLL and right of it for probes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vikdf"  # the same figures, the same file
    from matplotlib import pyplot

    reference = result["reference"]
    arms = {name: arm["reference_minus_this"] for name, arm in result["arms"].items() if "reference_minus_this" in arm}
    if "num_items" in result["arms"][reference]:
        shown = {key: key for key in shown_metrics(result["arms"][reference])}
        label = f"of {reference} minus the arm's (95 %)"
    else:
        shown = dict(zip(COMPARED, ("all tokens", "visual words"), strict=True))
        label = f"NLL of {reference} minus the arm's, nats a token (95 %)"
    names = sorted(arms, key=lambda name: arms[name][next(iter(shown))]["difference"])
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.2 * max(len(shown), 2) * len(names)), layout="constrained")
    for number, (key, title) in enumerate(shown.items()):
        offset = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        rows = [(i + offset, arms[name][key]) for i, name in enumerate(names) if key in arms[name]]
        centres = [difference["difference"] for _, difference in rows]
        lows, highs = zip(*(difference["confidence_95"] for _, difference in rows), strict=True) if rows else ((), ())
        axes.errorbar(
            centres,
            [row for row, _ in rows],
            xerr=[
                [centre - low for centre, low in zip(centres, lows, strict=True)],
                [high - centre for centre, high in zip(centres, highs, strict=True)],
            ],
            fmt="o",
            label=title,
        )
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.set_title(result["data"])
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
