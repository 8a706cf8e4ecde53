"""Plans: what a job may do to a site's data, and what the operator signs about it. Pure values."""
