"""The command `llmsys`: a table of commands, each in the room it belongs to."""

import importlib
import sys

from llmsys import env

# name → the module that has a function of that name
COMMANDS = {"bench": "llmsys.perf.cli", "doctor": "llmsys.doctor", "train": "llmsys.train.command"}


def main() -> None:
    for package in ("typer", "rich"):
        if not env.has(package):
            sys.exit(f"llmsys.cli: {package} is not installed, expected it; pip install 'llmsys[train]'")
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    for name, module in COMMANDS.items():
        app.command(name)(getattr(importlib.import_module(module), name))
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if not str(error).startswith("llmsys."):
            raise
        sys.exit(str(error))
