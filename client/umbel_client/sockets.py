"""Where the sockets of a site's two processes are."""

from pathlib import Path

from umbel_client.config import ClientConfig, RelayConfig


def control_socket(config: ClientConfig) -> Path:
    """Where the site's own people reach the trainer: in its state folder, closed to all others."""
    return Path(config.state) / "control.sock"


def trainer_socket(relay: RelayConfig) -> Path:
    """Where the relay reaches the trainer."""
    return Path(relay.socket)


def relay_socket(relay: RelayConfig) -> Path:
    """Where probes reach the relay: beside the trainer's."""
    return Path(relay.socket).with_name("relay.sock")
