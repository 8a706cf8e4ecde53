"""The life of a daemon: one of a kind, supervised, confined, logged. No protocol is known here."""
