"""The `infsvc` command: one file a subcommand, imported when it is called."""

from __future__ import annotations

import importlib

import click

from infsvc import __version__

_COMMANDS = {
    "serve": "Run a node without a screen.",
    "chat": "Ask a model, once or in a conversation.",
    "embed": "Turn texts into vectors.",
    "status": "Say what runs, once.",
    "models": "List the models, fetch and remove their files.",
    "logs": "Print a model's audit rows.",
    "doctor": "Look at everything a node needs.",
    "queue": "Look into the durable queue, and at requests that could not be answered.",
    "monitor": "Watch every model of every node on a broker.",
    "dashboard": "Serve the web dashboard.",
    "start": "Load a model: in the running node, or in a new one in the background.",
    "stop": "Unload a model, or end the node.",
    "req": "Send a request over NATS and print the reply.",
    "pub": "Publish a message over NATS.",
    "sub": "Print what is published on a NATS subject.",
}


class _Lazy(click.Group):
    """A group whose commands live in modules of the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"infsvc.cli.{'control' if cmd_name in ('start', 'stop') else cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The short texts stand here, so that --help imports no command.
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="infsvc")
def infsvc() -> None:
    """Run language models on your own machines and serve them to programs.

    The full-screen app is `infsvc-tui`.
    """
