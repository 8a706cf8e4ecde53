"""The side with the network. Nothing here may import jobs, storage or aggregation."""
