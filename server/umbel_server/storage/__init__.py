"""Journal, queue, registry and backup: on disk before anything is sent. No process, no network."""
