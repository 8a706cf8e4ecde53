"""`umbel-client`: commands parse, call and print. Nobody imports them."""

from umbel_client.cli.command import app, main

__all__ = ["app", "main"]
