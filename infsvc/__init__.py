"""infsvc: run language models on your own machines and serve them to programs.

Importing this package loads no engine, no server and no screen.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
