"""The charts: the files and values that they take, and what becomes of them."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from deploy.charts import (
    CHARTS,
    CLIENT_TOML,
    EVERYTHING,
    GPU,
    KEY_DIGEST,
    SERVER_TOML,
    VALUES,
    Object,
    containers,
    kind,
    pod_of,
    refused,
    render,
)

from umbel_client.site import config as client_config
from umbel_client.site.config import relay_socket, trainer_socket
from umbel_server.operator import config as server_config

charts = pytest.mark.parametrize("chart", sorted(VALUES))

# ---- configuration: the files that people made, and the pod's own paths -----------------------


def load_client(folder: Path, text: str) -> client_config.ClientConfig:
    (folder / "client.toml").write_text(text)
    return client_config.load_config(folder / "client.toml")


def test_the_trainer_reads_what_the_site_wrote_with_the_pods_paths(tmp_path: Path) -> None:
    written = load_client(tmp_path, CLIENT_TOML)
    config = kind(render("umbel-site", tmp_path), "ConfigMap")["data"]
    rendered = load_client(tmp_path, config["client.toml"])
    assert rendered.policy == written.policy
    assert rendered.data.public_size == written.data.public_size
    assert rendered.relay is not None
    assert written.relay is not None
    assert rendered.relay.server == written.relay.server
    mounted = containers(pod_of(render("umbel-site", tmp_path)))
    trainer, relay = (set(mounted[name].volumes()) for name in ("trainer", "relay"))
    for path in (
        rendered.state, rendered.identity, rendered.data.path, rendered.model.path, rendered.roster,
        rendered.relay.socket,
    ):  # fmt: skip
        assert any(path == root or path.startswith(f"{root}/") for root in trainer), path
    for path in (rendered.relay.key, rendered.relay.certificate, rendered.relay.server_ca):
        assert any(path.startswith(f"{root}/") for root in relay), path
    assert rendered.data.path == "/data/notes.jsonl"
    assert config["roster.json"] == '{"sites": []}'


def test_a_policy_file_and_former_rosters_lie_beside_it(tmp_path: Path) -> None:
    config = kind(render("umbel-site", tmp_path, EVERYTHING["umbel-site"]), "ConfigMap")["data"]
    assert tomllib.loads(config["client.toml"])["policy"] == "policy.toml"
    assert config["policy.toml"] == "models = []\n"
    assert config[f"roster-{'c' * 64}.json"] == "{}"


def test_the_server_reads_what_the_operator_wrote_with_the_pods_paths(tmp_path: Path) -> None:
    config = kind(render("umbel-operator", tmp_path), "ConfigMap")["data"]
    (tmp_path / "server.toml").write_text(config["server.toml"])
    rendered = server_config.load_config(tmp_path / "server.toml")
    assert rendered.limits.train_seconds == 7200
    assert rendered.listen.public == "umbel.example:9443"
    assert rendered.listen.address == "[::]:9443"
    mounted = containers(pod_of(render("umbel-operator", tmp_path)))
    for name, paths in {
        "rounds": (rendered.state, rendered.identity, rendered.roster, rendered.socket),
        "port": (
            rendered.state, rendered.sites, rendered.socket, rendered.listen.key,
            rendered.listen.certificate, rendered.listen.client_ca,
        ),
    }.items():  # fmt: skip
        roots = set(mounted[name].volumes())
        for path in paths:
            assert path is not None
            assert any(path.startswith(f"{root}/") for root in roots), path


def test_probes_ask_at_the_sockets_that_the_processes_open(tmp_path: Path) -> None:
    site = render("umbel-site", tmp_path)
    operator = render("umbel-operator", tmp_path)
    client = load_client(tmp_path, kind(site, "ConfigMap")["data"]["client.toml"])
    (tmp_path / "server.toml").write_text(kind(operator, "ConfigMap")["data"]["server.toml"])
    server = server_config.load_config(tmp_path / "server.toml")
    assert client.relay is not None
    sockets = {
        "trainer": trainer_socket(client.relay),
        "relay": relay_socket(client.relay),
        "port": server_config.carrier_socket(server),
        "rounds": server_config.rounds_socket(server),
    }
    found = containers(pod_of(site)) | containers(pod_of(operator))
    for name, socket in sockets.items():
        ready = found[name].spec["readinessProbe"]["exec"]["command"]
        assert ready == ["python", "-P", "-m", "umbel_host.probe", f"unix:{socket}"]
        for probe in ("livenessProbe", "startupProbe"):
            shell = found[name].spec[probe]["exec"]["command"]
            assert shell == [
                "sh",
                "-c",
                f"python -P -m umbel_host.probe unix:{socket}; test $? -le 1",
            ]


@pytest.mark.parametrize(("code", "alive"), [(0, True), (1, True), (20, False)])
def test_a_process_that_is_not_well_is_alive_and_one_that_is_silent_is_not(
    tmp_path: Path, code: int, alive: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    command = containers(pod_of(render("umbel-site", tmp_path)))["relay"].spec["livenessProbe"]
    done = subprocess.run(
        command["exec"]["command"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False
    )
    assert (done.returncode == 0) is alive


def annotation(objects: list[Object]) -> str:
    template = kind(objects, "StatefulSet")["spec"]["template"]["metadata"]
    return str(template["annotations"]["umbel/configuration"])


def test_a_site_starts_again_with_another_roster_and_an_operator_reads_it(tmp_path: Path) -> None:
    other = {"roster": '{"sites": [1]}'}
    site, operator = "umbel-site", "umbel-operator"
    assert annotation(render(site, tmp_path)) == annotation(render(site, tmp_path))
    assert annotation(render(site, tmp_path)) != annotation(render(site, tmp_path, other))
    assert annotation(render(operator, tmp_path)) == annotation(render(operator, tmp_path, other))
    changed = {"serverToml": SERVER_TOML.replace("7200", "7201")}
    assert annotation(render(operator, tmp_path)) != annotation(render(operator, tmp_path, changed))


# ---- images and GPUs --------------------------------------------------------------------------


def test_an_image_is_named_by_its_digest_where_there_is_one(tmp_path: Path) -> None:
    values: Object = {
        "trainer": {"image": {"tag": "latest"}},
        "relay": {"image": {"digest": "", "tag": "1"}},
    }
    found = containers(pod_of(render("umbel-site", tmp_path, values)))
    assert found["trainer"].spec["image"] == f"registry.example/umbel-trainer-cpu@{KEY_DIGEST}"
    assert found["relay"].spec["image"] == "registry.example/umbel-relay:1"


def test_gpus_are_the_trainers(tmp_path: Path) -> None:
    pod = pod_of(render("umbel-site", tmp_path, GPU))
    found = containers(pod)
    resources = found["trainer"].spec["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "2", "memory": "64Gi"}
    assert resources["requests"] == {"nvidia.com/gpu": "2", "cpu": "4", "memory": "8Gi"}
    assert "nvidia" not in json.dumps(found["relay"].spec)
    assert pod["runtimeClassName"] == "nvidia"
    assert "nvidia" not in json.dumps(pod_of(render("umbel-site", tmp_path)))


# ---- values that are wrong ----------------------------------------------------------------------


@charts
def test_every_value_is_described_and_every_description_is_of_a_value(chart: str) -> None:
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text())

    def compare(values: Object, part: Object, where: str) -> None:
        while "$ref" in part:
            part = schema["definitions"][part["$ref"].rpartition("/")[2]]
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, where
        free = {"quantities", "global"}
        assert set(values) == set(part["properties"]) - free, where
        for name, value in values.items():
            if isinstance(value, dict) and name not in {"requests", "limits"}:
                compare(value, part["properties"][name], f"{where}.{name}")

    compare(yaml.safe_load((CHARTS / chart / "values.yaml").read_text()), schema, chart)


WRONG: list[tuple[str, Object, str]] = [
    ("umbel-site", {"replicas": 2}, "additional properties 'replicas' not allowed"),
    (
        "umbel-site",
        {"trainer": {"isolation": "off"}},
        "additional properties 'isolation' not allowed",
    ),
    (
        "umbel-site",
        {"trainer": {"gpu": {"count": "2"}}},
        "at '/trainer/gpu/count': got string, want integer",
    ),
    ("umbel-site", {"trainer": {"image": {"digest": "sha256:1"}}}, "at '/trainer/image/digest'"),
    (
        "umbel-site",
        {"trainer": {"image": {"digest": ""}}},
        "trainer.image: found neither digest nor tag",
    ),
    ("umbel-site", {"identity": {"existingSecret": ""}}, "at '/identity/existingSecret'"),
    ("umbel-site", {"state": {"accessMode": "ReadWriteMany"}}, "at '/state/accessMode'"),
    ("umbel-site", {"operator": {"cidrs": []}}, "operator: found neither cidrs nor namespace"),
    (
        "umbel-site",
        {"proxy": {"cidrs": ["10.1.2.3/32"]}},
        "proxy: found one of existingSecret and cidrs, accepted: both or neither",
    ),
    ("umbel-site", {"operator": {"cidrs": ["umbel.example"]}}, "at '/operator/cidrs/0'"),
    ("umbel-site", {"dns": {"podLabels": None}}, "at '/dns': missing property 'podLabels'"),
    ("umbel-site", {"clientToml": "site ="}, "clientToml: found toml: line 1"),
    ("umbel-site", {"clientToml": 'site = "north"'}, "clientToml: data: found no such table"),
    (
        "umbel-site",
        {"clientToml": CLIENT_TOML.replace(":9443", "")},
        "clientToml: relay.server: found umbel.example, accepted: host:port",
    ),
    ("umbel-site", {"policyToml": "models = []"}, "policyToml: found a policy, accepted: nothing"),
    (
        "umbel-site",
        {"formerRosters": {"x": "{}"}},
        "at '/formerRosters': additional properties 'x'",
    ),
    ("umbel-operator", {"relay": {}}, "additional properties 'relay' not allowed"),
    ("umbel-operator", {"service": {"type": "ExternalName"}}, "at '/service/type'"),
    ("umbel-operator", {"serverToml": "[listen"}, "serverToml: found toml: line 1"),
    (
        "umbel-operator",
        {"serverToml": SERVER_TOML + '[evaluation]\nholdout = "a"\nmodel = "b"\n'},
        "serverToml: evaluation: found a table, accepted: none",
    ),
    ("umbel-operator", {"image": {"digest": ""}}, "image: found neither digest nor tag"),
]


@pytest.mark.parametrize(("chart", "values", "said"), WRONG)
def test_a_wrong_value_is_refused_with_a_line_that_names_it(
    tmp_path: Path, chart: str, values: Object, said: str
) -> None:
    lines = refused(chart, tmp_path, values).splitlines()
    assert len([line for line in lines if said in line]) == 1, lines


@charts
def test_without_values_every_one_that_is_missing_is_named(tmp_path: Path, chart: str) -> None:
    nothing = dict.fromkeys(VALUES[chart])
    said = refused(chart, tmp_path, nothing)
    missing = re.search(r"missing propert(?:y|ies) (.*)", said)
    assert missing is not None, said
    assert set(re.findall(r"'(\w+)'", missing[1])) == set(VALUES[chart])
