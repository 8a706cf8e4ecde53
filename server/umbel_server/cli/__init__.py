"""`umbel-server`: commands parse, call and print. Nothing may import them."""

from umbel_server.cli.command import app, main

__all__ = ["app", "main"]
