"""What a run shows to people, and what it keeps in files."""
