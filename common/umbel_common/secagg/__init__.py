"""Secure aggregation: Bonawitz et al. 2017 with the signed consistency round (section 6).

The server learns the sum of the survivors' vectors and nothing else, provided that fewer than the
threshold of sites collude with it; a malicious server is stopped by signatures, by binding every
key to the attempt's context, and by the rules in `participant`. docs/protocol.md has the messages.

`messages <- primitives, shamir, masking <- participant, coordinator`.
"""
