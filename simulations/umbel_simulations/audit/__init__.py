"""Attacks on a site's own training, which measure what the privacy claim is worth."""
