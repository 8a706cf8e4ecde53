"""The side with the operator's key. Nothing here may import the port."""
