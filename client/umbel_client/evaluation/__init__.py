"""How good an adapter is, and what it answers. Nothing here trains."""
