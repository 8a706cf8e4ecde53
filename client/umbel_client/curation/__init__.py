"""A file of records as its owner looks at it: check, count, split. Nothing here trains."""
