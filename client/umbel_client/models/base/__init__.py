"""The frozen model of a local folder. Nothing here may know an adapter."""
