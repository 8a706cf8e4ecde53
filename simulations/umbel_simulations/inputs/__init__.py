"""Public texts, base models, and their division among sites."""
