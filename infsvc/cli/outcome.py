"""How every command ends: 0 fine, 1 failed, 2 wrong usage; a user's error prints its cause and mend, no traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import click

from infsvc.errors import InfsvcError, UnknownModel

P = ParamSpec("P")
R = TypeVar("R")


def friendly(function: Callable[P, R]) -> Callable[P, R]:
    """Turns an `InfsvcError` of a command into one line and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UnknownModel as error:
            raise click.UsageError(str(error)) from None
        except InfsvcError as error:
            fail(str(error))
        except BrokenPipeError:
            # The reader of our output has gone (`| head`): nothing is left to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return wrapped


def fail(sentence: str) -> NoReturn:
    """Prints what went wrong and exits with 1."""
    click.echo(f"infsvc: {sentence}", err=True)
    sys.exit(1)
