"""The group `nomad`: its commands, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any, TextIO

import click

import nomad
from nomad import errors
from nomad.cli import bench, cluster, common, explain, export, pipelines, plan, profile, programs
from nomad.cli.master import login, master
from nomad.cli.up import up

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a mistake in Nomad itself, or nobody takes the output: the disk is full, the reader has gone
  2  wrong usage of the command line
  3  no master answers
  4  the token is missing or wrong
  5  what was named isn't there
  6  it exists already, or is in a state that doesn't allow this
  7  refused: the pipeline, the bundle, the topology, the state folder or a value is not valid
  8  the pipeline failed, or a move was rolled back
  130  interrupted by Ctrl-C
"""

_CODES: tuple[tuple[type[errors.NomadError], int], ...] = (
    (errors.MasterUnreachable, 3),
    (errors.AuthenticationError, 4),
    (errors.NotFoundError, 5),
    (errors.ConflictError, 6),
    (common.PipelineFailed, 8),
    (common.MoveFailed, 8),
)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Why a write to standard output fails; that its reader has gone is seen to by click."""


def exit_code(exc: errors.NomadError) -> int:
    """The exit code for an error; see `nomad --help`."""
    if type(exc) is errors.UsageError:
        return 2
    return next((code for kind, code in _CODES if isinstance(exc, kind)), 7)


class Nomad(click.Group):
    """Tells errors that were to be expected in words, without a traceback, and turns them into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except errors.NomadError as exc:
            click.echo(f"{click.style('Error:', fg='red')} {exc}", err=True)
            raise click.exceptions.Exit(exit_code(exc)) from exc
        except KeyboardInterrupt:  # the ordinary end of what follows something; click would say "Aborted!"
            raise click.exceptions.Exit(130) from None


@click.group(
    cls=Nomad, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(nomad.__version__, message="%(version)s")
def cli() -> None:
    """Run pipelines of plain Python functions over edge, fog and cloud.

    \b
    Start a cluster on this machine:   nomad up --node edge --node cloud
    Submit a file to it:               nomad submit pipeline.py --start edge --end cloud
    Look at it:                        nomad ls, nomad show ID, nomad tail ID OPERATOR

    The master is at --master, else NOMAD_MASTER, else http://127.0.0.1:30000.
    """


@cli.command(short_help="Show the versions of Nomad and of Python.")
@common.json_option
def version(as_json: bool) -> None:
    """Show the versions of Nomad and of Python."""
    python = ".".join(map(str, sys.version_info[:3]))
    common.Out(as_json).document(
        {"nomad": nomad.__version__, "python": python}, text=f"nomad {nomad.__version__} (Python {python})"
    )


@cli.command(short_help="Print completion for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, pipelines and operators.

    \b
    bash:  nomad completion bash >> ~/.bashrc
    zsh:   nomad completion zsh  >> ~/.zshrc
    fish:  nomad completion fish > ~/.config/fish/completions/nomad.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "nomad", "_NOMAD_COMPLETE").source())


MODULES = (programs, pipelines, explain, export, cluster, plan, profile, bench)
for command in (up, master, login, *(command for module in MODULES for command in module.COMMANDS)):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="nomad")
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        click.echo(f"{click.style('Error:', fg='red')} the output can't be written: {exc.strerror}", err=True)
        sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"{click.style('Warning:', fg='yellow')} {message}", err=True)
