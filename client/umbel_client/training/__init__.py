"""The local training loop of a round. Nothing here charges or sends."""
