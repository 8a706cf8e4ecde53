"""The operator's own word: configuration, authority, admitted sites. Nothing here may import any
other wing.
"""
