"""From records to losses, the same for each kind of task."""
