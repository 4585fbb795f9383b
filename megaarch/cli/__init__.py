"""The command line: a file a command, and how errors end them."""

from megaarch.cli.main import main, parser

__all__ = ["main", "parser"]
