"""A base model and its adapter as one."""
