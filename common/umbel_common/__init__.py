"""What both sides of a federation share: values, encodings and the protocol core, without IO.

Nothing here opens a file or a socket, reads a clock, writes a log or draws randomness of its own:
whoever needs entropy is handed it (`Entropy`), so every state machine can be driven by a test.
"""
