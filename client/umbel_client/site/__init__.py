"""The site's own word: configuration, policy, decisions, pinned roster. Nothing here may import any
other wing.
"""
