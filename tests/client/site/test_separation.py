"""Trainer and relay say, each for itself, whether they are kept apart."""

import logging
import os
from pathlib import Path

import msgspec
import pytest

from umbel_client.site.config import ClientConfig, RelayConfig, load_config, require_relay
from umbel_client.site.separation import judge_separation, relay_not_apart, trainer_not_apart
from umbel_common.errors import ConfigError

CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "data.jsonl"
public_size = 100

[model]
path = "model"

[relay]
server = "127.0.0.1:1"

[policy]
"""


@pytest.fixture(autouse=True)
def _not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    (tmp_path / "client.toml").write_text(CLIENT_TOML)
    return load_config(tmp_path / "client.toml")


@pytest.fixture
def relay(config: ClientConfig, tmp_path: Path) -> RelayConfig:
    return require_relay(config, tmp_path)


def test_two_processes_that_see_their_own_files_only_are_apart(
    config: ClientConfig, relay: RelayConfig, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    assert trainer_not_apart(relay) is None
    assert relay_not_apart(config) is None


def test_a_trainer_that_reads_the_relays_key_is_not_apart(
    relay: RelayConfig, tmp_path: Path
) -> None:
    (tmp_path / "relay").mkdir()
    (tmp_path / "relay" / "key.pem").touch()
    assert trainer_not_apart(relay) == f"the trainer's user, 12345, can read {relay.key}"


@pytest.mark.parametrize("name", ["identity.pem", "data.jsonl", "state/ledger.sqlite"])
def test_a_relay_that_reads_what_is_the_trainers_is_not_apart(
    config: ClientConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / name).touch()
    assert f"can read {tmp_path / name}" in str(relay_not_apart(config))


def test_root_is_never_apart(
    config: ClientConfig, relay: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert trainer_not_apart(relay) == "the trainer runs as root"
    assert relay_not_apart(config) == "the relay runs as root"


def test_what_is_not_apart_is_said_loudly_and_refused_where_isolation_is_required(
    config: ClientConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        judge_separation(config, tmp_path, None, "umbel.trainer")
        assert not caplog.records
        judge_separation(config, tmp_path, "the trainer runs as root", "umbel.trainer")
    (record,) = caplog.records
    assert "TRAINER AND RELAY ARE NOT KEPT APART: the trainer runs as root" in record.message
    strict = msgspec.structs.replace(config, isolation="required")
    judge_separation(strict, tmp_path, None, "umbel.trainer")
    with pytest.raises(ConfigError) as refusal:
        judge_separation(strict, tmp_path, "the trainer runs as root", "umbel.trainer")
    assert refusal.value.field == "isolation"
    assert refusal.value.found == "the trainer runs as root"
