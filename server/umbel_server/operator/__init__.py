"""What the operator decides: configuration, authority, admitted sites. Nothing here may import
another wing.
"""
