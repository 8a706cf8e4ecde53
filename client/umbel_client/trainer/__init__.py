"""The process with the data: a sealed request in, a sealed reply out. Nothing here may import the
network.
"""
