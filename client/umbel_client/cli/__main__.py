"""`python -m umbel_client.cli`: the same as `umbel-client`."""

from umbel_client.cli import main

if __name__ == "__main__":
    main()
