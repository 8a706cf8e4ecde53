"""Unix sockets and Flower messages: sealed bytes pass. Nothing here may open a seal."""
