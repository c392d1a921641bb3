"""The `eff` command. A command parses, calls one library function, prints; heavy imports sit inside."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from eff.cli.app import app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors of eff become one line on stderr and their exit code."""
    from eff.errors import EffError

    if (here := os.getcwd()) not in sys.path:  # for package.module:factory; last, so that nothing installed is hidden
        sys.path.append(here)
    try:
        app(args=list(arguments) if arguments is not None else None)
    except EffError as error:
        for line in str(error).splitlines():
            print(f"eff: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as done:
        if done.code == 130:  # typer's answer to Ctrl-C, which says nothing
            print("eff: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
