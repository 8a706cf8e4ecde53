"""The aggregation server: learns sums, keeps releases, never imports torch.

`round` and `aggregate` are pure; `job` drives them; `store`, `registry` and `flower` touch disk and
network.
"""
