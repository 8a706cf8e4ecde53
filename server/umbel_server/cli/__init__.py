"""`umbel-server`: commands parse, call and print. Nobody imports them."""

from umbel_server.cli.command import app, main

__all__ = ["app", "main"]
