"""The learning curve as a picture: `curve.png` of a run.

Owns: what is drawn. Does not know how figures come about.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GREEN, BLUE, GREY = "#2a7f4f", "#2b5c9e", "#9aa0a6"


def learning_curve(rows: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Evaluation metrics above, mean training reward below, over steps. Draws nothing for a run without rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({key for row in rows for key in row if key.startswith("eval/") and not key.endswith("/reward")})
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2))
    for name, color in zip(names, (GREEN, BLUE, "#8a4f9e", "#b3652b", GREY), strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        above.plot(*zip(*points, strict=True), marker="o", color=color, label=name.removeprefix("eval/"))
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    if rewards:
        below.plot(*zip(*rewards, strict=True), color=GREY, linewidth=1, label="reward, one step")
        below.plot(*zip(*smoothed(rewards), strict=True), color=BLUE, linewidth=2, label="reward, mean of 5 steps")
    above.set(title=title, ylabel="held-out, greedy")
    below.set(xlabel="step", ylabel="training, sampled")
    _finish(figure, target)
    pyplot.close(figure)


def trial_curves(trials: Sequence[tuple[str, Sequence[tuple[int, float]]]], target: Path, title: str) -> None:
    """One line a trial: its figure at each evaluation. The one that ends highest is drawn last, and green."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    ranked = sorted((trial for trial in trials if trial[1]), key=lambda trial: trial[1][-1][1])
    for place, (name, points) in enumerate(ranked):
        best = place == len(ranked) - 1
        style = (
            {"color": GREEN, "linewidth": 2.5} if best else {"color": BLUE, "alpha": 0.2 + 0.5 * place / len(ranked)}
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name if best else None, **style)
    axes.set(title=title, xlabel="step", ylabel="held-out")
    _finish(figure, target)
    pyplot.close(figure)


def _finish(figure: Any, target: Path) -> None:
    """A grid and a legend in each part, then the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def smoothed(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """Each point with the mean of the `window` values up to it."""
    means = []
    for position, (step, _) in enumerate(points):
        recent = [value for _, value in points[max(position - window + 1, 0) : position + 1]]
        means.append((step, sum(recent) / len(recent)))
    return means
