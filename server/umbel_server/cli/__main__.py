"""`python -m umbel_server.cli`: the same as `umbel-server`."""

from umbel_server.cli import main

if __name__ == "__main__":
    main()
