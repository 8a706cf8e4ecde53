"""`make modes`: what shared noise is worth: distributed mode, local mode, pooled and alone.

Heads on cached features of the quickstart's texts and encoder, by the product's own training: each
site's noisy sum or delta, the sum of all, and the server's step. Masks cancel, so none are made.
Each row is a setting under several seeds; a seed divides the records, and draws batches and noise.
Rows that are in the file are not computed again. About an hour; writes a JSON file that is
committed beside docs/benchmarks.md.
"""
