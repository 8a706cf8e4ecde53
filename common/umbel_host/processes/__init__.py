"""The life of a daemon: one of a kind, supervised, confined. Nothing here may know a protocol."""
