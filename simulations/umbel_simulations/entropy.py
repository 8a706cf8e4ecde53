"""Predictable randomness, for scenarios that ask for it by the name `insecure_test_seed`."""

import hashlib
import threading

from umbel_common.canonical import Entropy


def seeded(seed: int, party: str) -> Entropy:
    """A stream of bytes that anyone who knows the seed can compute: nothing is private with it.

    Each party has a stream of its own, so that the order in which sites work does not matter.
    """
    lock = threading.Lock()
    drawn = 0

    def entropy(size: int) -> bytes:
        nonlocal drawn
        with lock:
            drawn += 1
            label = f"insecure test seed {seed} {party} {drawn}"
        return hashlib.shake_256(label.encode()).digest(size)

    return entropy
