"""Whether this terminal can carry the full screen; asked before Textual is started."""

from __future__ import annotations

from collections.abc import Mapping

MIN_COLUMNS, MIN_ROWS = 40, 10


def terminal_problem(environ: Mapping[str, str], isatty: bool, size: tuple[int, int]) -> str | None:
    """A sentence that says why the app cannot run here and what to do, or None.

    Args:
        environ: the environment, for TERM.
        isatty: whether standard input and output both are a terminal.
        size: columns and rows. A small one is no reason to refuse, as it can be enlarged; none at all (0, 0) is.
    """
    if not isatty:
        return (
            "the full screen needs a terminal, and input or output is not one: "
            "use `infsvc serve` for the same node without a screen"
        )
    term = environ.get("TERM", "")
    if term in ("", "dumb"):
        named = f"TERM={term}" if term else "TERM is not set"
        return (
            f"{named}: this terminal cannot place text on a full screen. "
            "Use `infsvc serve` for the same node without a screen, or set TERM to your terminal's name"
        )
    if 0 in size:
        return "the terminal does not tell its size: use `infsvc serve`, or set it with `stty cols 80 rows 24`"
    return None
