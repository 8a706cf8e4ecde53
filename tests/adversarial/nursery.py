"""The process that starts sites of tests: `python -m adversarial.nursery ADDRESS`.

Its first order is the rest of what `nursery` is called with.
"""

import sys
from multiprocessing.connection import Client

import umbel_client.training.self_test

if __name__ == "__main__":
    # A site is started a hundred times: it does not try its noise each time.
    umbel_client.training.self_test.self_test = lambda *arguments, **options: None
    # What follows imports it.
    from adversarial.site_process import nursery

    orders = Client(sys.argv[1])
    folder, plan, public_size, prepare = orders.recv()
    nursery(folder, sys.argv[1], plan, public_size, prepare, orders)
