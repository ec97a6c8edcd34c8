"""The learning curve as a picture: `curve.png` of a run.

Owns: what is drawn. Does not know how figures come about.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GREEN, BLUE, GREY = "#2a7f4f", "#2b5c9e", "#9aa0a6"
COLORS = (BLUE, "#b3652b", "#8a4f9e", "#3c9aa8", "#a8455f")
LABELLED = 1 + len(COLORS)
"""Trials that the legend names; all others are grey."""


def learning_curve(rows: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Evaluation metrics above, mean training reward below, over steps. Draws nothing for a run without rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({key for row in rows for key in row if key.startswith("eval/") and not key.endswith("/reward")})
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 6), height_ratios=(3, 2))
    for place, name in enumerate(names):  # As many as there are: after six colours come other strokes.
        again, color = divmod(place, LABELLED)
        style = {"color": (GREEN, *COLORS)[color], "linestyle": ("-", "--", ":", "-.")[again % 4]}
        points = [(row["step"], row[name]) for row in rows if name in row]
        above.plot(*zip(*points, strict=True), marker="o", ms=4, label=name.removeprefix("eval/"), **style)
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    if rewards:
        below.plot(*zip(*rewards, strict=True), color=GREY, linewidth=1, label="reward, one step")
        below.plot(*zip(*smoothed(rewards), strict=True), color=BLUE, linewidth=2, label="reward, mean of 5 steps")
    above.set(title=title, ylabel="held-out, greedy")
    below.set(xlabel="step", ylabel="training, sampled")
    _finish(figure, target)
    pyplot.close(figure)


class TrialCurve(NamedTuple):
    """One trial of a search. Search -> plot."""

    label: str
    points: Sequence[tuple[int, float]]
    best: float | None
    spread: float | None
    """Standard deviation over folds or seeds at the best step."""


def trial_curves(trials: Sequence[TrialCurve], target: Path, title: str, metric: str) -> None:
    """One line a trial, its figure at each evaluation: the best trial first, in green; `LABELLED` have a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    drawn = [trial for trial in trials if trial.points]
    for place, trial in reversed(list(enumerate(drawn))):
        color = (GREEN, *COLORS)[place] if place < LABELLED else GREY
        label = f"{trial.label}: {trial.best:.3f}" if place < LABELLED else None
        axes.plot(
            *zip(*trial.points, strict=True), marker="o", ms=4, color=color, label=label, lw=1 + 1.5 * (not place)
        )
        if trial.spread is not None and place < LABELLED:
            at = max(trial.points, key=lambda point: point[1])
            axes.errorbar(*at, yerr=trial.spread, color=color, capsize=3, lw=1)
    axes.set(title=title, xlabel="step", ylabel=f"held-out {metric}")
    _finish(figure, target, best_first=True)
    pyplot.close(figure)


def _finish(figure: Any, target: Path, best_first: bool = False) -> None:
    """A grid and a legend in each part, then the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.has_data():
            axes.legend(
                frameon=False, fontsize="small", reverse=best_first, loc="upper left", bbox_to_anchor=(1.0, 1.0)
            )
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def smoothed(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """Each point with the mean of the `window` values up to it."""
    means = []
    for position, (step, _) in enumerate(points):
        recent = [value for _, value in points[max(position - window + 1, 0) : position + 1]]
        means.append((step, sum(recent) / len(recent)))
    return means
