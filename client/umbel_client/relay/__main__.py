"""`python -m umbel_client.relay client.toml`: the process with the network."""

import sys

from umbel_client.relay.process import main

if __name__ == "__main__":
    sys.exit(main())
