"""Journal, queue, registry and backup: on disk before anything is sent. Nothing here may start a
process or use a network.
"""
