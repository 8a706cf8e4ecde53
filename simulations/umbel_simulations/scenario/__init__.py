"""The scenario file, its plan, and its folder."""
