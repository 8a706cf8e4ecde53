"""Sealed bytes between the two processes of the operator. Nothing here may open a seal."""
