"""The process that starts sites of tests: `python -m adversarial.nursery ADDRESS`.

Its first order is the rest of what `nursery` is called with.
"""

import sys
from multiprocessing.connection import Client

from adversarial.site_process import nursery

if __name__ == "__main__":
    orders = Client(sys.argv[1])
    folder, plan, public_size, prepare = orders.recv()
    nursery(folder, sys.argv[1], plan, public_size, prepare, orders)
