"""infsvc: run language models on your own machines and serve them to programs.

Importing this package loads no engine, no server, no screen and no network library; `Client` is found when it is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infsvc.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from infsvc.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
