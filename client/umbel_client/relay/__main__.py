"""`python -m umbel_client.relay client.toml`: the process with the network."""

from umbel_host.entry import enter


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    from umbel_client.relay.process import main as run_relay

    return run_relay()


if __name__ == "__main__":
    enter(main)
