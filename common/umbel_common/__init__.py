"""What both sides of a federation share: values, encodings and the protocol core, without IO.

Nothing here opens a file or a socket, reads a clock, writes a log or draws randomness of its own.
The caller hands entropy in (`Entropy`), so a test can drive every state machine.
"""
