"""The project's own exceptions: every failure that a user can cause or mend is one of these.

A job prints the message alone and leaves with `exit_code`; anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class StairstepError(Exception):
    """A failure with a message for the user; a job that meets one exits with 1."""

    exit_code = 1


class InputError(StairstepError):
    """Bad input: a recipe, a data file, a tile or a command line that the user has to mend (exit code 2)."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe that cannot be read or does not fit the schema."""


class DataError(InputError):
    """A data file, a row or a folder that is not what the recipe says."""


class MissingDataError(DataError):
    """A data file that is not there at all: perhaps it was not fetched yet."""


class TileError(InputError):
    """One tile that cannot be read or decoded."""


class UnreachableError(StairstepError):
    """Something outside this process could not be reached: a hub, a server, a device."""


class TrainingError(StairstepError):
    """Training stopped because going on would be wrong, for example on a loss that is not finite."""


class FetchError(StairstepError):
    """Data that could not be fetched whole: no room, wrong bytes, a hub that refuses."""
