"""What an operator runs with the client's packages, on public records: drafts and the search for
hyper-parameters.
"""
