"""Messages and transcript: what parties say, and what anybody can verify later."""
