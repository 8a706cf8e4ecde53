"""Adapters as one flat vector: what sites sum. Nothing here may do IO or know a protocol."""
