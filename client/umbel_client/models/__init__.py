"""A base model and its adapter as one."""

import logging

# PEFT imports bitsandbytes where it is installed, which complains that it found no code on a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
