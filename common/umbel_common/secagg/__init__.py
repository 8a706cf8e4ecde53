"""Secure aggregation: Bonawitz et al. 2017 with the signed consistency round (section 6).

The server learns the sum of the survivors' vectors and nothing else, as long as fewer sites than
the threshold collude with it. Signatures, the binding of every key to the attempt's context, and
the rules in `participant` stop a malicious server. docs/protocol.md has the messages.

The law of every module here: no clock, no file, no network, no log, and randomness from `Entropy`
alone. `participant` and `coordinator` number the steps of an attempt, in the order that must hold.
"""
