"""The aggregation server: it learns sums, keeps releases, and never imports torch.

`aggregation` is pure; `jobs` drives it; `storage` writes to disk, and `port` has the network.
"""
