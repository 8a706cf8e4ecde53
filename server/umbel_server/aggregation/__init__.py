"""Pure steps of one attempt: requests out, replies in, the sum becomes an adapter. No clock, no
disk, no network.
"""
