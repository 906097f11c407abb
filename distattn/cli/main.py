"""The ``distattn`` command. Exit codes: 0 done, 1 failure, 2 bad usage or configuration; errors are one sentence."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from distattn.errors import ConfigError, DistattnError

app = typer.Typer(
    help="Train models at 64K to millions of tokens of context, on schedules that are data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for instance configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys to set")] = None,
) -> None:
    """Train or resume, one process per device here; joins RANK and WORLD_SIZE where they are set.

    SIGTERM saves a checkpoint and exits with 0: the same command resumes. A finished run says so.
    """
    from distattn.cli.train import train as run

    raise typer.Exit(run(config, overrides or []))


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the run.dir of a training")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys to set")] = None,
    step: Annotated[int | None, typer.Option(help="which checkpoint; default: the newest")] = None,
) -> None:
    """Held-out loss of a checkpoint by position in the context; writes RUN_DIR/eval.json."""
    from distattn.cli.evaluate import eval_run

    raise typer.Exit(eval_run(run_dir, overrides or [], step))


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def export(context: typer.Context) -> None:
    """Write a checkpoint's weights for Hugging Face transformers."""
    from distattn.cli.export import app as export_app

    export_app(context.args, prog_name="distattn export")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Verify, cost, simulate and draw a schedule."""
    from distattn.cli.plan import app as plan_app

    plan_app(context.args, prog_name="distattn plan")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def doctor(context: typer.Context) -> None:
    """What is installed, which kernels and transports work here, what is missing and how to get it."""
    if "--cluster" in context.args:
        from distattn.cli.cluster import app as doctor_app
    else:
        from distattn.cli.doctor import app as doctor_app

    doctor_app(context.args, prog_name="distattn doctor")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure kernels, schedules and exchanges on this machine, beside their peers."""
    from distattn.cli.bench import bench as run

    run(context.args)


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def submit(context: typer.Context) -> None:
    """Start or resume a run in the background, on this machine, on Slurm or on Ray."""
    from distattn.cli.submit import app as submit_app

    submit_app(context.args, prog_name="distattn submit")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def jobs(context: typer.Context) -> None:
    """The jobs submitted from here, and how far each has come."""
    from distattn.cli.jobs import jobs_app

    jobs_app(context.args, prog_name="distattn jobs")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def logs(context: typer.Context) -> None:
    """What a rank of a job printed."""
    from distattn.cli.jobs import logs_app

    logs_app(context.args, prog_name="distattn logs")


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def cancel(context: typer.Context) -> None:
    """End a job; its ranks write a checkpoint first."""
    from distattn.cli.jobs import cancel_app

    cancel_app(context.args, prog_name="distattn cancel")


def main() -> None:
    """Entry point of the command line."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except DistattnError as error:
        _fail(error, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
