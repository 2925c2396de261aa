"""Where both scripts and `python -m infsvc` enter: finds the app's folders, then hands over to the command line."""

from __future__ import annotations

import sys

from infsvc.home import app_root


def _find_app() -> None:
    """Puts the folder that holds `engine`, `tui`, … first, so that no folder of the same name where one stands is
    taken for it.
    """
    root = str(app_root())
    if sys.path[:1] != [root]:
        sys.path.insert(0, root)


def main() -> None:
    """The `infsvc` command."""
    _find_app()
    from infsvc.cli import infsvc

    infsvc(prog_name="infsvc")


def main_tui() -> None:
    """The `infsvc-tui` command."""
    _find_app()
    from infsvc.cli.app import app

    app(prog_name="infsvc-tui")


if __name__ == "__main__":
    main()
