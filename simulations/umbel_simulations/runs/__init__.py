"""A run, its comparisons, and its verification."""
