"""The command `rollcast`: words in, exit codes out.

Owns: verbs, options, help, how an error is shown, exit codes (0 done, 1 failed, 2 usage or configuration,
3 diverged, 130 Ctrl-C). Does not know what a verb does: each imports its part only when it is called, so that
help is instant.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from rollcast import cli_env, cli_fleet, cli_keys, cli_live, cli_talk
from rollcast.errors import RollcastError, UsageError

if TYPE_CHECKING:
    from rollcast.config import RunConfig

OVERRIDES = "rollcast.overrides"
OVERRIDE = re.compile(r"--[A-Za-z_]\w*\.[^=]+(=.*)?", re.DOTALL)

app = typer.Typer(
    help="Reinforcement learning of language models as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class WithOverrides(TyperCommand):
    """A verb that takes `--section.key value` for any setting, before or after its other words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[OVERRIDES], rest = take_overrides(args)
        return super().parse_args(ctx, rest)


def take_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts dotted options (as `--section.key=value`) from the other words; `--` ends options."""
    overrides: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            others += [word, *rest]
        elif not (match := OVERRIDE.fullmatch(word)):
            others.append(word)
        else:
            overrides.append(word if match[1] else f"{word}={_value_of(word, rest)}")
    return overrides, others


def _value_of(word: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None or value.startswith("--"):
        why = "nothing follows it" if value is None else f"{value!r} follows it"
        raise UsageError(f"{word} has no value", why, f"write {word} VALUE or {word}=VALUE")
    return value


app.add_typer(cli_env.verbs(WithOverrides, OVERRIDES), name="env")
app.add_typer(cli_keys.verbs(), name="keys")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run (docs/config.md).")]
RunName = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and of its folder.")]
Resume = Annotated[
    str, typer.Option(metavar="auto|never|PATH", help="Go on from the newest checkpoint, from none, or from this one.")
]
FromRun = Annotated[
    str | None,
    typer.Option("--from-run", metavar="RUN", help="Begin with the best policy of this run, and with its feedback."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")]


@app.callback()
def rollcast() -> None:
    """Reinforcement learning of language models as a service.

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 diverged, 130 Ctrl-C.
    """


@app.command(
    cls=WithOverrides,
    epilog="Example: rollcast train deploy/configs/demo.toml --run first --learner.learning_rate 1e-5",
)
def train(
    context: typer.Context,
    config: ConfigFile,
    run: RunName = None,
    resume: Resume = "auto",
    dry_run: DryRun = False,
    from_run: FromRun = None,
    as_json: PlanAsJson = False,
) -> None:
    """Train a policy, or resume its training, here or on the cluster that RAY_ADDRESS names.

    With --from-run it begins with the best policy of another run; run.every makes that a round a time, each promoted
    only if it is better (docs/continual.md). Any setting can be given as --section.key VALUE.
    """
    from rollcast.plan import run_directory

    settings = _planned(config, _overrides(context, run), resume, dry_run, as_json, plays=True, source=from_run)
    if settings is None:
        return
    if from_run is not None:
        from rollcast.continual import train_from
        from rollcast.runs import find

        train_from(settings, find(from_run, Path(settings.run.dir)), resume, _report)
    else:
        from rollcast.train import train as start

        start(settings, run_directory(settings), resume)


@app.command(
    cls=WithOverrides,
    epilog="Example: rollcast sft deploy/configs/translation-sft.toml --learner.learning_rate 1e-4",
)
def sft(
    context: typer.Context,
    config: ConfigFile,
    run: RunName = None,
    resume: Resume = "auto",
    dry_run: DryRun = False,
    as_json: PlanAsJson = False,
) -> None:
    """Warm up a policy on the references of its environments, before it is trained by reinforcement.

    Takes the same settings as train. A step learns from as many references as train would play samples; the last policy
    is written to RUN/policy, for model.path of the run that goes on. Any setting can be given as --section.key VALUE.
    """
    from rollcast.plan import run_directory

    settings = _planned(config, _overrides(context, run), resume, dry_run, as_json, plays=False)
    if settings is not None:
        from rollcast.sft import sft as start

        start(settings, run_directory(settings), resume)


@app.command(
    cls=WithOverrides,
    epilog='Example: rollcast tune deploy/configs/qa.toml --tune.space.learner.clip_high "[0.2, 0.28]" --tune.trials 4',
)
def tune(
    context: typer.Context,
    config: ConfigFile,
    run: RunName = None,
    as_json: AsJson = False,
) -> None:
    """Search settings: a run for each combination that [tune] names, one after the other or several at a time.

    Prints a table of the trials, the best first; the runs, trials.json and trials.png are in runs/NAME. Typed again, it
    goes on with what is not done. Any setting can be given as --section.key VALUE.
    """
    from rollcast import display
    from rollcast.config_file import load_config
    from rollcast.plan import make_plan, run_directory
    from rollcast.tune import show
    from rollcast.tune import tune as search

    settings = load_config(config, _overrides(context, run))
    make_plan(settings)
    found = search(settings, run_directory(settings), _report)
    if as_json:
        typer.echo(json.dumps([asdict(trial) for trial in found], indent=2))
    else:
        show(found, display.screen())


def _planned(
    config: Path,
    overrides: list[str],
    resume: str,
    dry_run: bool,
    as_json: bool,
    plays: bool,
    source: str | None = None,
) -> "RunConfig | None":
    """The settings of a run that can start here; None when only its plan was asked for, which is then printed.

    A run from another run, `source`, is planned with that one's model.
    """
    from rollcast.config_file import load_config
    from rollcast.plan import make_plan, render

    if as_json and not dry_run:
        raise UsageError("--json prints nothing here", "only the plan is printed as JSON", "add --dry-run")
    _refuse_missing_checkpoint(resume)
    settings = load_config(config, overrides)
    settings = _after(settings, source)
    plan = make_plan(settings if plays else settings.without_rollouts())
    if dry_run:
        typer.echo(json.dumps(asdict(plan), indent=2) if as_json else render(plan))
    return None if dry_run else settings


def _after(settings: "RunConfig", source: str | None) -> "RunConfig":
    """With the size of model of the run that it begins from, if any. Refuses a schedule without one."""
    if source is None:
        if settings.run.every is not None or settings.run.below is not None:
            why = "its rounds begin from a run, and none is named"
            raise UsageError("run.every and run.below need --from-run", why, "add --from-run RUN, or remove them")
        return settings
    from rollcast.export import settings_of
    from rollcast.runs import find

    path = settings_of(find(source, Path(settings.run.dir))).model.path
    return settings.model_copy(update={"model": settings.model.model_copy(update={"path": path})})


@app.command(cls=WithOverrides, epilog="Example: rollcast demo --seed 1 --run second")
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Where all chance starts from.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Learner steps.")] = None,
    run: RunName = None,
) -> None:
    """Watch a small instruct model learn to answer questions, in about ten minutes on two CPU cores.

    Any setting of deploy/configs/demo.toml can be given as --section.key VALUE.
    """
    from rollcast.demo import demo as start

    start(seed, steps, run, _overrides(context))


Runs = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run below ./runs (or --run.dir), or its folder.")]
Policies = Annotated[
    str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or a folder checkpoints/step_N of one.")
]
Which = Annotated[
    Literal["best", "last"] | None,
    typer.Option(help="Of a run: the best policy or the last one (default: best where one is recorded, else last)."),
]


@app.command(cls=WithOverrides, epilog="Example: rollcast status demo")
def status(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="Name of a run below ./runs (or --run.dir), or its folder; else the newest."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One screen on a run: step, reward, fleet, versions, staleness, and what waits for what."""
    from rollcast import display
    from rollcast import status as told
    from rollcast.runs import find

    found = told.status(find(run, _only_run_dir(context)))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        told.show(found, display.screen())


@app.command(cls=WithOverrides, epilog="Example: rollcast runs --run.dir /data/runs")
def runs(context: typer.Context, as_json: AsJson = False) -> None:
    """All runs of a folder, the newest first."""
    from rollcast import display
    from rollcast import status as told
    from rollcast.runs import known

    base = _only_run_dir(context)
    lines = [told.line_of(run) for run in known(base)]
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
    elif lines:
        told.show_all(lines, display.screen())
    else:
        typer.echo(f"no runs below {base.absolute()}")


@app.command(cls=WithOverrides, epilog="Example: rollcast rollouts demo --step 8 --limit 4")
def rollouts(
    context: typer.Context,
    run: Runs,
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="The step to show; else the newest.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples of a step to print (16; all of them with --json).")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with each step as it comes, until the run ends.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Token by token: probabilities, value, advantage, and how it was pushed.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="With --tokens: write a page for the browser instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line (docs/files.md).")] = False,
) -> None:
    """What was played: prompt, answer, reward, metrics and the policy versions that answered."""
    from rollcast import display
    from rollcast.rollouts import rollouts as tell
    from rollcast.rollouts import rollouts_by_token
    from rollcast.runs import find

    if follow and step is not None:
        raise UsageError("--follow and --step exclude each other", "one step has no sequel", "leave one of them out")
    if tokens and (follow or as_json):
        raise UsageError("--tokens shows one step", "it is for people to look at", "leave out --follow and --json")
    if page is not None and not tokens:
        raise UsageError("--page goes with --tokens", "only tokens have a page", "add --tokens")
    found = find(run, _only_run_dir(context))
    if tokens:
        rollouts_by_token(found, step, limit, page, display.screen())
    else:
        tell(found, step, limit, follow, as_json, display.screen())


@app.command(cls=WithOverrides, epilog="Example: rollcast export demo models/demo-trained")
def export(
    context: typer.Context,
    policy: Policies,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it is new or empty.")],
    which: Which = None,
    as_json: AsJson = False,
) -> None:
    """Write a policy as a plain Hugging Face folder, which transformers and vLLM load.

    Any setting of the run can be given as --section.key VALUE, such as --model.path.
    """
    from rollcast.export import export as write
    from rollcast.export import settings_of
    from rollcast.runs import find_source

    base, overrides = _run_dir(context)
    source = find_source(policy, base)
    done = write(source, folder, which, settings_of(source.run, overrides), _report)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        step = "" if done.step is None else f", step {done.step}"
        typer.echo(f"{done.path}: {done.run}{step}, policy version {done.policy_version}")


@app.command("eval", cls=WithOverrides, epilog="Example: rollcast eval demo --env rollcast/QA-v0 --split test")
def evaluate(
    context: typer.Context,
    policy: Policies,
    env: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Environment to play, as rollcast/QA-v0, or its name in the run; else the run's own."
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the environment's data.")] = "test",
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Only the first N questions; 0: the split.")] = 0,
    sampled: Annotated[
        int, typer.Option(min=0, metavar="K", help="Also K sampled answers to each question: avg@k and pass@k.")
    ] = 0,
    which: Which = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved policy on a split: greedy answers, played in this process with the run's engine.

    Any setting of the run can be given as --section.key VALUE, such as --rollout.engine torch.
    """
    from rollcast import display
    from rollcast import evaluate_run as measured
    from rollcast.export import settings_of
    from rollcast.runs import find_source

    base, overrides = _run_dir(context)
    source = find_source(policy, base)
    asked = measured.Asked(env, split, samples, sampled, which)
    found = measured.evaluate_run(source, settings_of(source.run, overrides), asked, _report)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        measured.show(found, display.screen())


@app.command(epilog="Example: rollcast doctor --fix")
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove the shared memory that dead rollcast processes left.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is wrong with this machine, and what to do. Exit code 1 when a check fails."""
    from rollcast import display
    from rollcast import doctor as checks

    found = checks.examine(fix, _report)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found], indent=2))
    else:
        checks.show(found, display.screen())
    if checks.failed(found):
        raise typer.Exit(1)


def _report(text: str) -> None:
    """Progress and warnings, beside what a verb prints."""
    typer.echo(text, err=True)


def _run_dir(context: typer.Context) -> tuple[Path, list[str]]:
    """Where runs lie, and the other overrides."""
    base, others = Path("runs"), []
    for word in _overrides(context):
        name, _, value = word.partition("=")
        if name == "--run.dir":
            base = Path(value).expanduser()
        else:
            others.append(word)
    return base, others


cli_talk.add_talk_verbs(app)
app.add_typer(cli_talk.feedback_verbs(WithOverrides, _run_dir), name="feedback")
cli_live.add(app, WithOverrides, _run_dir)


def _only_run_dir(context: typer.Context) -> Path:
    base, others = _run_dir(context)
    if others:
        name = others[0].partition("=")[0]
        raise UsageError(
            f"{name} changes nothing here", "the run is only looked at", "only --run.dir is of use; leave it out"
        )
    return base


cli_fleet.add_verbs(app, WithOverrides, _only_run_dir)


def _overrides(context: typer.Context, run: str | None = None) -> list[str]:
    """The command line's settings; `--run NAME` is short for `--run.name NAME`."""
    overrides: list[str] = list(context.meta[OVERRIDES])
    return [*overrides, f"--run.name={run}"] if run is not None else overrides


def _refuse_missing_checkpoint(resume: str) -> None:
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UsageError(
            f"--resume {resume}: there is no such checkpoint",
            "it is neither auto nor never nor a folder",
            "name a folder such as runs/NAME/checkpoints/step_10, or leave the option out",
        )


def show(error: RollcastError) -> None:
    """Prints what / why / do this to stderr; in colour only where a person looks at it."""
    text = Text()
    text.append(f"{error.what}\n", style="bold red")
    text.append("why: ", style="bold").append(f"{error.why}\n")
    text.append("do this: ", style="bold").append(error.fix)
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; anything but a `RollcastError` is a bug and keeps its traceback."""
    try:
        app(args=arguments)
    except RollcastError as error:
        show(error)
        sys.exit(error.exit_code)
