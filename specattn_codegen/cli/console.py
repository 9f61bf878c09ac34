"""How every command ends: results on stdout, an error as one line on stderr, exit code 2 for it and 130 for Ctrl-C."""

from __future__ import annotations

import sys

import click

from specattn_codegen.errors import DISK_ERRORS, SpecAttnError


def run(command: click.Command) -> None:
    """Runs a click command as a program. Bugs keep their traceback; a user's mistake or a full disk gets one line."""
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.UsageError as error:
        asked = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        _fail(error.format_message().rstrip(".") + asked)
    except click.ClickException as error:
        _fail(error.format_message())
    except SpecAttnError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'output'}: {error.strerror}; free some space or choose a writable folder")
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)


def _fail(message: str) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(2)
