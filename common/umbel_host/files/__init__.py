"""Files that are whole on disk or absent. Nothing here may know a protocol or a decision."""
