"""One private step: each record's gradient, clipped, summed, noised. Nothing here may know of a
federation.
"""
