"""The charts: what they render is valid, restricted, and holds the law of the house."""

import copy
import json
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deploy.charts import (
    CASES,
    CHARTS,
    CLIENT_TOML,
    ROOT,
    VALUES,
    Object,
    containers,
    is_note,
    kind,
    pod_of,
    render,
    run_helm,
    unrestricted,
)

from umbel_client.ledger.register import MACHINE

charts = pytest.mark.parametrize("chart", sorted(VALUES))
cases = pytest.mark.parametrize(("chart", "values"), CASES)


# ---- what is rendered is a cluster's, and no more than a namespace's ----------------------------


@cases
def test_every_object_fits_the_schemas_of_kubernetes(
    tmp_path: Path, chart: str, values: Object
) -> None:
    for item in render(chart, tmp_path, values):
        for version in ("1.29", "1.33", "1.37"):
            assert kubernetes_validate.validate(item, version, strict=True) == version


def test_the_schemas_refuse_a_field_that_kubernetes_does_not_know(tmp_path: Path) -> None:
    item = kind(render("umbel-site", tmp_path), "StatefulSet")
    item["spec"]["template"]["spec"]["containers"][0]["readOnlyRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRoot"):
        kubernetes_validate.validate(item, "1.37", strict=True)


@charts
def test_helm_finds_nothing_to_say(tmp_path: Path, chart: str) -> None:
    done = run_helm(chart, tmp_path, {}, "lint", "--strict", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr


@cases
def test_nothing_is_asked_of_the_cluster(tmp_path: Path, chart: str, values: Object) -> None:
    objects = render(chart, tmp_path, values)
    kinds = {item["kind"] for item in objects}
    assert kinds <= {"ConfigMap", "NetworkPolicy", "StatefulSet", "Service"}
    pod = pod_of(objects)
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod
    assert "hostUsers" not in pod
    for item in objects:
        assert "namespace" not in item["metadata"]


@charts
def test_the_version_is_the_projects(chart: str) -> None:
    found = yaml.safe_load((CHARTS / chart / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["appVersion"] == found["version"] == project["version"]


# ---- PodSecurity: restricted, and more ---------------------------------------------------------


@cases
def test_pods_are_admitted_where_pod_security_is_restricted(
    tmp_path: Path, chart: str, values: Object
) -> None:
    pod = pod_of(render(chart, tmp_path, values))
    assert list(unrestricted(pod)) == []
    for container in containers(pod).values():
        security = container.spec["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["runAsUser"] in {10001, 10002}
        assert security["runAsGroup"] == pod["securityContext"]["fsGroup"] == 10000
        assert "add" not in security["capabilities"]
        assert container.spec["resources"]["requests"]
        assert container.spec["resources"]["limits"]["memory"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"privileged": True}, "trainer: privileged"),
        ({"allowPrivilegeEscalation": None}, "trainer: allowPrivilegeEscalation"),
        ({"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, "trainer: capabilities.add"),
        ({"capabilities": {}}, "trainer: capabilities.drop"),
        ({"runAsUser": 0}, "trainer: runAsUser"),
        ({"runAsNonRoot": False}, "trainer: runAsNonRoot"),
        ({"seccompProfile": {"type": "Unconfined"}}, "trainer: seccompProfile"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(tmp_path: Path, change: Object, said: str) -> None:
    pod = copy.deepcopy(pod_of(render("umbel-site", tmp_path)))
    containers(pod)["trainer"].spec["securityContext"].update(change)
    assert list(unrestricted(pod)) == [said]


# ---- the side with data has no network; the side with network has no data ------------------------


@cases
def test_each_process_is_given_its_own_and_nothing_of_the_others(
    tmp_path: Path, chart: str, values: Object
) -> None:
    objects = render(chart, tmp_path, values)
    pod = pod_of(objects)
    assert pod["shareProcessNamespace"] is False
    found = containers(pod)
    inner, outer = ("trainer", "relay") if chart == "umbel-site" else ("rounds", "port")
    users = {name: found[name].spec["securityContext"]["runAsUser"] for name in (inner, outer)}
    assert users[inner] != users[outer]
    both = {volume["name"] for volume in found[inner].volumes().values()} & {
        volume["name"] for volume in found[outer].volumes().values()
    }
    assert both == {"config", "sockets"}
    # Keys: from each Secret one init container of the same user copies, into memory.
    for name in (inner, outer):
        first = found[f"{name}-key"]
        assert first.spec["securityContext"] == found[name].spec["securityContext"]
        assert first.volumes()["/keys"] == found[name].volumes()["/keys"]
        assert first.volumes()["/keys"]["emptyDir"]["medium"] == "Memory"
        assert len(first.secrets()) == 1
        assert not found[name].secrets()
        where = [mount["mountPath"] for mount in found[name].spec["volumeMounts"]]
        assert found[name].spec["volumeMounts"][where.index("/keys")]["readOnly"] is True
    assert found[f"{inner}-key"].secrets() != found[f"{outer}-key"].secrets()
    config = kind(objects, "ConfigMap")
    assert "PRIVATE" not in json.dumps(config)


@cases
def test_a_process_writes_nowhere_but_in_its_state_its_sockets_and_tmp(
    tmp_path: Path, chart: str, values: Object
) -> None:
    for container in containers(pod_of(render(chart, tmp_path, values))).values():
        writable = {
            mount["mountPath"]
            for mount in container.spec["volumeMounts"]
            if not mount.get("readOnly")
        }
        allowed = {"/keys"} if container.name.endswith("-key") else {
            "/var/lib/umbel", "/var/lib/umbel-ledgers", "/run/umbel", "/tmp"
        }  # fmt: skip
        assert writable <= allowed


def test_the_register_of_ledgers_is_on_the_state_volume_and_the_data_are_taken_once(
    tmp_path: Path,
) -> None:
    """Helm refuses an object that another release owns; a kept one outlives its release."""
    objects = render("umbel-site", tmp_path)
    assert containers(pod_of(objects))["trainer"].volumes()[str(MACHINE)]["name"] == "state"
    (note,) = [item for item in objects if is_note(item)]
    assert note["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_a_relay_has_neither_data_nor_model_nor_state(tmp_path: Path) -> None:
    found = containers(pod_of(render("umbel-site", tmp_path)))
    assert {"/data", "/model", "/var/lib/umbel"} <= set(found["trainer"].volumes())
    assert set(found["relay"].volumes()) == {"/etc/umbel", "/keys", "/run/umbel", "/tmp"}


@pytest.mark.parametrize("said", ['isolation = "preferred"', 'isolation = "required"', ""])
def test_no_value_lets_a_trainer_keep_its_network(tmp_path: Path, said: str) -> None:
    text = CLIENT_TOML.replace('isolation = "preferred"', said)
    objects = render("umbel-site", tmp_path, {"clientToml": text})
    rendered = tomllib.loads(kind(objects, "ConfigMap")["data"]["client.toml"])
    assert rendered["isolation"] == "required"
    trainer = containers(pod_of(objects))["trainer"].spec
    assert trainer["command"] == [
        "python",
        "-P",
        "-m",
        "umbel_client.trainer_process",
        "client.toml",
    ]
    assert "env" not in trainer


def test_from_a_site_one_port_is_reached_and_names_are_asked_for(tmp_path: Path) -> None:
    objects = render("umbel-site", tmp_path)
    policy = kind(objects, "NetworkPolicy")["spec"]
    labels = kind(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == []
    operator, names = policy["egress"]
    assert operator == {
        "to": [{"ipBlock": {"cidr": "203.0.113.7/32"}}],
        "ports": [{"protocol": "TCP", "port": 9443}],
    }
    (resolver,) = names["to"]
    assert resolver["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "kube-system"
    }
    assert resolver["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    assert {(port["protocol"], port["port"]) for port in names["ports"]} == {
        ("UDP", 53),
        ("TCP", 53),
    }


def test_through_a_proxy_nothing_but_the_proxy_is_reached(tmp_path: Path) -> None:
    values: Object = {
        "operator": {"cidrs": []},
        "proxy": {"existingSecret": "way-out", "cidrs": ["10.1.2.3/32"]},
        "dns": {"enabled": False},
    }
    objects = render("umbel-site", tmp_path, values)
    assert kind(objects, "NetworkPolicy")["spec"]["egress"] == [
        {
            "to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}],
            "ports": [{"protocol": "TCP", "port": 3128}],
        }
    ]
    found = containers(pod_of(objects))
    (variable,) = found["relay"].spec["env"]
    assert variable["name"] == "HTTPS_PROXY"
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "way-out", "key": "HTTPS_PROXY"}
    assert not [name for name in found if name != "relay" and "env" in found[name].spec]


def test_a_site_that_knows_the_address_asks_nobody_for_names(tmp_path: Path) -> None:
    policy = kind(render("umbel-site", tmp_path, {"dns": {"enabled": False}}), "NetworkPolicy")
    assert len(policy["spec"]["egress"]) == 1


def test_to_an_operator_one_port_leads_and_nothing_out(tmp_path: Path) -> None:
    objects = render("umbel-operator", tmp_path)
    policy = kind(objects, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9443}]}]
    (port,) = containers(pod_of(objects))["port"].spec["ports"]
    (served,) = kind(objects, "Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    assert port["containerPort"] == 9443
    assert "ports" not in containers(pod_of(objects))["rounds"].spec


# ---- what must survive ------------------------------------------------------------------------


@cases
def test_there_is_one_pod_and_its_state_outlives_the_release(
    tmp_path: Path, chart: str, values: Object
) -> None:
    objects = render(chart, tmp_path, values)
    stateful = kind(objects, "StatefulSet")["spec"]
    assert stateful["replicas"] == 1
    assert stateful["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain",
        "whenScaled": "Retain",
    }
    # Made by the StatefulSet, not by the release: `helm uninstall` leaves it.
    assert "PersistentVolumeClaim" not in {item["kind"] for item in objects}
    pod = stateful["template"]["spec"]
    claims = stateful.get("volumeClaimTemplates", [])
    given = [volume for volume in pod["volumes"] if volume["name"] == "state"]
    assert len(claims) + len(given) == 1
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


@charts
def test_no_second_pod_gets_at_the_state_unless_it_is_wanted(tmp_path: Path, chart: str) -> None:
    (claim,) = kind(render(chart, tmp_path), "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
