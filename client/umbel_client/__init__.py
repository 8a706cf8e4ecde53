"""A site's side: it judges, trains, and sends what its own policy and ledger allow."""

import logging

# PEFT imports bitsandbytes where it is installed, which complains that it found no code on a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
