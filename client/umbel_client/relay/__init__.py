"""The process with the network. Nothing here may import data, models, ledger or trainer."""
