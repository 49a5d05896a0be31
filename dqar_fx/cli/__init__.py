"""The command line, ``dqar-fx`` and ``python -m dqar_fx``. Each command is a module of this package.

Such a module has ``HELP``, one line; ``add_arguments(parser)``; and ``run(args)``, which returns the exit code. What
is slow to import (torch, diffusers, matplotlib) it imports when it runs: ``--help`` and a mistyped option do not wait.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from dqar_fx import __version__
from dqar_fx.errors import DqarError

COMMANDS = ("demo", "bench", "calibrate", "evaluate", "explain", "generate", "sweep", "trace", "train-policy")
USAGE_ERROR = 2  # as argparse exits
INTERRUPTED = 130  # as a shell reports SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after an error that the message explains.

    Raises:
        SystemExit: by argparse, after ``--help``, ``--version`` or a mistake in the arguments.
    """
    args = _make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return 1
    except KeyboardInterrupt:
        if args.debug:
            traceback.print_exc()
        return INTERRUPTED
    except (DqarError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"dqar-fx: error: {error}\n")
        return USAGE_ERROR
    return code


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqar-fx",
        description="Faster diffusion transformer sampling: a torch.compile pass that reuses attention across steps.",
    )
    parser.add_argument("--version", action="version", version=f"dqar-fx {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"dqar_fx.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        # Accepted after the command too; suppressed, its default does not undo one given before.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
