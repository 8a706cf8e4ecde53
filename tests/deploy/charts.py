"""The charts, rendered by Helm, and what is asked of the objects."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "deploy" / "helm"
Object = dict[str, Any]

KEY_DIGEST = "sha256:" + "5" * 64
CLIENT_TOML = """\
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
isolation = "preferred"

[data]
path = "notes.jsonl"
public_size = 5000

[model]
path = "models/minilm"

[policy]
models = ["{model}"]
labels = ["benign", "malignant"]
max_epsilon = 2.5

[relay]
server = "umbel.example:9443"
""".format(model="ab" * 32)
SERVER_TOML = """\
state = "state"

[listen]
address = "0.0.0.0:19443"
public = "umbel.example:9443"

[limits]
train_seconds = 7200
"""
VALUES: dict[str, Object] = {
    "umbel-site": {
        "clientToml": CLIENT_TOML,
        "roster": '{"sites": []}',
        "identity": {"existingSecret": "north-identity"},
        "relayKey": {"existingSecret": "north-relay"},
        "data": {"existingClaim": "north-data"},
        "model": {"existingClaim": "base-model"},
        "trainer": {
            "image": {"repository": "registry.example/umbel-trainer-cpu", "digest": KEY_DIGEST}
        },
        "relay": {"image": {"repository": "registry.example/umbel-relay", "digest": KEY_DIGEST}},
        "operator": {"cidrs": ["203.0.113.7/32"]},
    },
    "umbel-operator": {
        "serverToml": SERVER_TOML,
        "roster": '{"sites": []}',
        "identity": {"existingSecret": "operator-identity"},
        "tls": {"existingSecret": "operator-tls"},
        "image": {"repository": "registry.example/umbel-server", "digest": KEY_DIGEST},
    },
}
"""The least that each chart takes."""

GPU = {
    "trainer": {
        "gpu": {"count": 2, "runtimeClassName": "nvidia"},
        "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "64Gi"}},
    }
}
EVERYTHING: dict[str, Object] = {
    "umbel-site": {
        "clientToml": CLIENT_TOML.replace("[policy]", "[left_out]").replace(
            'site = "north"', 'policy = "policy.toml"\nsite = "north"'
        ),
        "policyToml": "models = []\n",
        "formerRosters": {"c" * 64: "{}"},
        "data": {"subPath": "notes"},
        "model": {"subPath": "models/minilm"},
        "state": {"storageClass": "fast", "accessMode": "ReadWriteOnce", "size": "1Ti"},
        "image": {"pullPolicy": "Always", "pullSecrets": ["registry"]},
        "trainer": GPU["trainer"],
        "relay": {"image": {"digest": "", "tag": "0.1.0"}},
        "operator": {"cidrs": ["203.0.113.7/32", "2001:db8::7/128"], "namespace": "operator"},
        "proxy": {"existingSecret": "way-out", "cidrs": ["10.1.2.3/32"], "port": 8080},
        "dns": {"cidrs": ["169.254.20.10/32"]},
    },
    "umbel-operator": {
        "sites": '{"sites": []}',
        "state": {"existingClaim": "journal"},
        "service": {
            "type": "LoadBalancer",
            "port": 443,
            "annotations": {"a.example/internal": "true"},
            "loadBalancerClass": "a.example/passthrough",
            "externalTrafficPolicy": "Local",
        },
        "from": {"cidrs": ["203.0.113.0/24"], "namespaces": ["north"]},
        "image": {"pullSecrets": ["registry"]},
    },
}
PLACED: Object = {
    "nodeSelector": {"disk": "local"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "high",
    "podAnnotations": {"a.example/b": "c"},
}
CASES = [
    ("umbel-site", {}),
    ("umbel-site", GPU),
    ("umbel-site", EVERYTHING["umbel-site"] | PLACED),
    ("umbel-site", {"state": {"existingClaim": "ledger"}, "dns": {"enabled": False}}),
    ("umbel-operator", {}),
    ("umbel-operator", EVERYTHING["umbel-operator"] | PLACED),
]
"""Values beside the least, of which each is rendered."""


_RENDERED: dict[tuple[str, str, str], str] = {}
"""What Helm made, by chart, release and values: several tests ask the same things of it."""


def helm() -> str:
    """Helm's path; skips the test where there is none."""
    beside = Path(sys.executable).with_name("helm")
    found = str(beside) if beside.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("there is no helm: `make test` fetches it, on Linux with x86-64 only")
    return found


def merged(base: Object, over: Object) -> Object:
    """As Helm merges values."""
    both = dict(base)
    for name, value in over.items():
        former = both.get(name)
        nested = isinstance(former, dict) and isinstance(value, dict)
        both[name] = merged(former, value) if nested else value
    return both


def run_helm(
    chart: str, folder: Path, values: Object, *command: str
) -> "subprocess.CompletedProcess[str]":
    """One of Helm's commands on a chart, with the least values and these."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(merged(VALUES[chart], values)))
    return subprocess.run(
        [helm(), *command, str(CHARTS / chart), "--values", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )


def render(
    chart: str, folder: Path, values: Object | None = None, *, name: str = "north"
) -> list[Object]:
    """The objects that a chart makes of these values, for a release of this name."""
    asked = chart, name, json.dumps(values or {}, sort_keys=True)
    if asked not in _RENDERED:
        done = run_helm(chart, folder, values or {}, "template", name, "--namespace", "umbel")
        assert done.returncode == 0, done.stderr
        _RENDERED[asked] = done.stdout
    documents = yaml.load_all(_RENDERED[asked], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [document for document in documents if document]


def refused(chart: str, folder: Path, values: Object) -> str:
    """What Helm says about values that it does not take."""
    done = run_helm(chart, folder, values, "template", "north")
    assert done.returncode != 0
    assert not done.stdout
    return done.stderr


@dataclass(frozen=True)
class Container:
    """A container of a pod, with what is mounted in it."""

    spec: Object
    pod: Object

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def volumes(self) -> dict[str, Object]:
        """Where -> the volume that is there."""
        by_name = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {
            mount["mountPath"]: by_name.get(mount["name"], {"name": mount["name"]})
            for mount in self.spec["volumeMounts"]
        }

    def secrets(self) -> set[str]:
        """Names of the Secrets that are mounted in it."""
        return {
            volume["secret"]["secretName"]
            for volume in self.volumes().values()
            if "secret" in volume
        }


def is_note(item: Object) -> bool:
    """Whether an object only keeps a second release away from a data set."""
    return bool(item["metadata"]["name"].startswith("umbel-ledger-"))


def kind(objects: list[Object], name: str) -> Object:
    """The only object of a kind, besides the note of which release has a data set's ledger."""
    (found,) = [item for item in objects if item["kind"] == name and not is_note(item)]
    return found


def pod_of(objects: list[Object]) -> Object:
    """The spec of the only pod."""
    spec: Object = kind(objects, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def containers(pod: Object) -> dict[str, Container]:
    """By name, those that begin before the others too."""
    every = [*pod.get("initContainers", []), *pod["containers"]]
    return {spec["name"]: Container(spec, pod) for spec in every}


_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip


def unrestricted(pod: Object) -> Iterator[str]:
    """What of a pod the Pod Security Standard `restricted` does not admit, in its own words."""
    of_pod = pod.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", []):
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"volume {volume['name']}"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        of_container = container.get("securityContext", {})
        effective = of_pod | of_container
        capabilities = of_container.get("capabilities", {})
        checks = {
            "privileged": not of_container.get("privileged", False),
            "allowPrivilegeEscalation": of_container.get("allowPrivilegeEscalation") is False,
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser") != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type")
            in {"RuntimeDefault", "Localhost"},
            "procMount": of_container.get("procMount", "Default") == "Default",
            "hostPorts": not any(port.get("hostPort") for port in container.get("ports", [])),
            "sysctls": not of_pod.get("sysctls"),
        }
        yield from (f"{container['name']}: {name}" for name, fine in checks.items() if not fine)
