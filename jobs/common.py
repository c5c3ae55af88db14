"""What every job shares: how a recipe and its overrides are read from a command line, and how a failure is told.

A failure that the user can mend is one message and exit code 2 (bad input) or 1 (everything else); only our own defects show a traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from stairstep.records.copies import copy_to_read
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import StairstepError
from stairstep.tasks import Recipe, load_recipe

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_ADVICE = "make room, or choose another run.root (tiles.store); nothing half-written counts, and the same command goes on where it was"
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_CLOSED_ADVICE = "change the permissions, or choose another run.root"


def parser(purpose: str) -> argparse.ArgumentParser:
    """A parser that takes a recipe and dotted overrides; a job adds its own flags, which are never shortened."""
    # Flags are written out: jobs look for some of them, and a shortened one would pass by unseen.
    made = argparse.ArgumentParser(description=purpose.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("recipe", help="recipe file, for example recipes/tinywiki.yaml")
    made.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides, for example optim.steps=20")
    return made


def parse(made: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """Arguments and the recipe that they name; flags and overrides may stand in any order."""
    options = made.parse_intermixed_args(arguments)
    return options, load_recipe(options.recipe, options.overrides)


def readable(text: str) -> Path:
    """A run, or a folder of runs, for a job that only reads it: the folder itself, or a copy of the one that a URL names."""
    found = place(text)
    return copy_to_read(found) if isinstance(found, ObjectFolder) else found


def run(main: Callable[[list[str]], int]) -> None:
    """Run a job's `main` and leave with its exit code."""
    try:
        code = main(sys.argv[1:])
    except StairstepError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = 1
    except (OSError, SafetensorError) as error:
        number, reason = _of_the_machine(error)
        if number not in (*_FULL, *_CLOSED):
            raise
        print(f"error: {reason}; {_FULL_ADVICE if number in _FULL else _CLOSED_ADVICE}", file=sys.stderr)
        code = 1 if number in _FULL else 2
    sys.exit(code)


def _of_the_machine(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """The operating system's number for a failure, and what it says; safetensors has the number in its text alone."""
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return error.errno, f"{named}{error.strerror or error}"
    found = re.search(r"\(os error (\d+)\)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))
