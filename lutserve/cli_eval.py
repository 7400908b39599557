"""`lutserve eval`: tasks or a whole matrix through a server, comparing what came out, checking claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutserve.cli_group import with_default
from lutserve.errors import UserError

if TYPE_CHECKING:
    from lutserve.eval.matrix import Matrix
    from lutserve.eval.runner import Outcome


app = typer.Typer(
    cls=with_default("run"),
    help="Accuracy through a server: lm-eval's tasks and perplexities; see `lutserve eval run --help`.",
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, comma separated, e.g. piqa,lambada_openai.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A matrix that comes with lutserve.")] = None,
    claims: Annotated[bool, typer.Option("--claims", help="Check what lutserve claims.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Alias, folder or hub id. In a matrix: instead of its own; repeatable."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Server to ask; default: start what is needed.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with offline data and tasks/local_*.yaml files.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Documents a task; below 1 a share of them.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples before each question.")
    ] = None,
    num_concurrent: Annotated[int, typer.Option(min=2, help="Questions in flight.")] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "out/eval"
    ),
    resume: Annotated[
        bool, typer.Option(help="With --tasks: go on where an interrupted run stopped.")
    ] = True,
) -> None:
    """Run MATRIX.yaml, a --preset or the --claims; or --tasks, where other flags go to `lutserve serve`.

    A matrix goes on where it stopped: finished cells in the output folder are not run again.
    """
    named = context.args[:1] if context.args and not context.args[0].startswith("-") else []
    if sum(map(bool, (named, tasks, preset, claims))) != 1:
        raise UserError("give one of MATRIX.yaml, --preset NAME, --claims or --tasks NAME[,NAME...]")
    if tasks:
        _one_server(
            tasks,
            model or [],
            base_url,
            data,
            limit,
            num_fewshot,
            num_concurrent,
            output,
            resume,
            context.args,
        )
        return
    if extra := context.args[len(named) :]:
        raise UserError(f"{extra[0]}: not with a matrix, whose recipes hold the flags of `lutserve serve`")
    if num_fewshot is not None or not resume:
        raise UserError("--num-fewshot and --no-resume are for --tasks; in a matrix a task has num_fewshot")
    from lutserve.eval import claim, matrix
    from lutserve.eval.runner import run_matrix

    if claims:
        chosen = list(matrix.claims())
    else:
        chosen = [matrix.preset(preset) if preset else matrix.load(Path(named[0]))]
    bad = 0
    for one in (m.with_changes(model or [], limit) for m in chosen):
        outcome = run_matrix(
            one,
            output=output,
            data=data,
            base_url=base_url,
            num_concurrent=num_concurrent,
            command=sys.argv[1:],
        )
        _show(one, outcome)
        verdicts = claim.check(one, outcome.rows)
        for verdict in verdicts:
            c = verdict.claim
            mark = "holds" if verdict.holds else "FAILS"
            print(f"{mark}: {c.model} {c.recipe} {c.task} {c.metric}: {verdict.reason}")
        bad += len(outcome.failures) + sum(not verdict.holds for verdict in verdicts)
    print(f"written to {output}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Folder of a matrix, with :RECIPE where it has several.")],
    b: Annotated[str, typer.Argument(help="What is compared with it.")],
) -> None:
    """Print paired differences B - A with standard errors, and how many answers flip."""
    from lutserve.console import for_tables
    from lutserve.eval import compare as comparing

    first, second = comparing.side(a), comparing.side(b)
    for_tables().print(comparing.table(comparing.compare(first, second)))


def _show(matrix: Matrix, outcome: Outcome) -> None:
    from rich.table import Table

    from lutserve.console import for_tables
    from lutserve.eval.runner import shown

    table = Table("model", "recipe", "task", "result", "published", title=matrix.name, box=None)
    for row in outcome.rows:
        published = ", ".join(f"{name} {value:g}" for name, value in row["published"].items())
        table.add_row(row["model"], row["recipe"], row["task"], shown(row), published)
    for_tables().print(table)
    for cell, reason in outcome.failures.items():
        print(f"not finished: {cell}: {reason.splitlines()[0]}", file=sys.stderr)


def _one_server(
    tasks: str,
    model: list[str],
    base_url: str | None,
    data: Path | None,
    limit: float | None,
    num_fewshot: int | None,
    num_concurrent: int,
    output: Path,
    resume: bool,
    flags: list[str],
) -> None:
    from lutserve import models
    from lutserve.eval.run import Settings
    from lutserve.eval.run import run as run_tasks

    if len(model) > 1:
        raise UserError("--tasks takes one --model; write a matrix for several")
    settings = Settings(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit=limit,
        num_fewshot=num_fewshot,
        num_concurrent=num_concurrent,
    )
    outcome = run_tasks(
        settings,
        output=output,
        model=None if base_url else (model or [models.DEFAULT])[0],
        server_args=flags,
        base_url=base_url,
        data=data,
        resume=resume,
    )
    print(outcome.table())
    print(f"written to {outcome.path}", file=sys.stderr)
