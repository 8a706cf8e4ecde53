"""The scenario file, its plan, and the folder of its run."""
