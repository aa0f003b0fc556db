"""The command line: one file per command, loaded when it is used."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from edgesam_deploy import __version__
from edgesam_deploy.errors import EdgeSAMError

COMMANDS = (
    "bench",
    "build",
    "compile",
    "distill",
    "doctor",
    "estimate",
    "eval",
    "explain",
    "export",
    "finetune",
    "models",
    "predict",
    "profile",
    "prune",
    "quantize",
    "search",
    "selfcheck",
    "simplify",
    "targets",
    "verify",
)


class Commands(click.Group):
    """Finds ``edgesam_deploy/cli/<name>.py`` by name, and is the one place that catches our errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"edgesam_deploy.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EdgeSAMError as error:
            fail(ctx, error, error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; finished stages are kept, run the same command to go on", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            # The reader (head, less) has gone; what is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:
            # The system failed where nobody asked it for a result: no space for temporary files, a folder that went.
            fail(ctx, error, EdgeSAMError.exit_code)


def fail(ctx: click.Context, error: Exception, exit_code: int) -> NoReturn:
    """End with one line on stderr, whatever text a file or another library put into the message."""
    click.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
    ctx.exit(exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sam-export")
def main() -> None:
    """From a Segment-Anything checkpoint to a verified bundle for an edge device.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished but below a threshold.
    """


if __name__ == "__main__":
    main()
