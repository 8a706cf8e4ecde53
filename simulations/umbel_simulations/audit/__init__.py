"""Attacks on a site's own training, to measure what the promise is worth."""
