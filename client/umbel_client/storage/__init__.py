"""Journal, deltas, adapter and backup: on disk before anything is sent. No process, no network."""
