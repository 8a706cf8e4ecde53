"""Pods of a chart as a kubelet would start them, by means of this machine: namespaces and mounts.

Each container has a root of its own over this machine's files, with the volumes of its spec and
nothing else that is writable; user, group and capabilities as the spec says; and neither `unshare`
nor `setns`, which a runtime's default profile refuses. All pods share one network that leads
nowhere else. What is not here: an image, the rest of that profile, a scheduler, a network plugin.
It needs root and overlayfs.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from deploy.charts import ROOT, Object, kind, pod_of
from support.container_filter import RUNTIME_FILTER
from support.waiting import HANGING

_PACKAGES = ("common", "client", "server")
_TOOLS = ("ip", "nsenter", "setpriv", "unshare")
GROUP = 10000

# What an image has in it: Python with Umbel's packages, and its folders.
_ROOT = r"""
set -eu
base=$1 python=$2 libraries=$3 source=$4 mounts=$5 folder=$6
shift 6
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
cd "$base/root"
mount -t proc proc proc
mount --rbind /dev dev
mkdir -p .former opt/python opt/umbel/bin opt/umbel/lib opt/umbel-source
mount --bind "$python" opt/python
mount --bind "$libraries" opt/umbel/lib
mount --bind "$source" opt/umbel-source
printf 'home = /opt/python/bin\n' > opt/umbel/pyvenv.cfg
ln -s /opt/python/bin/python3 opt/umbel/bin/python
for command in umbel-client:umbel_client.cli umbel-server:umbel_server.cli; do
    printf '#!/bin/sh\nexec python -m %s "$@"\n' "${command#*:}" > "opt/umbel/bin/${command%:*}"
    chmod 755 "opt/umbel/bin/${command%:*}"
done
for mount in $mounts; do
    from=${mount%%:*} to=${mount#*:}
    mkdir -p ".${to%:ro}"
    mount --bind "$from" ".${to%:ro}"
    case $to in *:ro) mount -o remount,bind,ro ".${to%:ro}" ;; esac
done
mount -o remount,ro "$base/root"
pivot_root . .former
umount -l /.former
cd "$folder"
exec "$@"
"""
_BECOME = RUNTIME_FILTER + "\nimport os, sys\nos.execvp(sys.argv[1], sys.argv[1:])\n"
_ENVIRONMENT = {
    "PATH": "/opt/umbel/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LD_LIBRARY_PATH": "/opt/python/lib",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": ":".join(f"/opt/umbel-source/{name}" for name in _PACKAGES),
}


def missing() -> str | None:
    """Why this machine can run no pods; None: it can."""
    if os.geteuid() != 0:
        return "only root makes namespaces and users"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], check=False)
    return None if tried.returncode == 0 else "this process may make no namespaces"


class Cluster:
    """A network for pods, and the folders of their volumes; until `close`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="umbel-pods-"))
        self._network = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.pods: list[Pod] = []
        deadline = time.monotonic() + HANGING
        here = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._network.pid}/ns/net") == here:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # A route to everywhere, as in a pod: a process there has a network to lose.
        for line in ("link set lo up", "route add default dev lo"):
            subprocess.run([*self.entry(), "ip", *line.split()], check=True)

    def entry(self) -> list[str]:
        """What a command is begun with to be in this network."""
        return ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", "--"]

    def pod(
        self, objects: list[Object], secrets: Mapping[str, Mapping[str, bytes]], **claims: Path
    ) -> "Pod":
        """The pod of what a chart rendered, not started.

        Args:
            secrets: those that the chart refers to.
            claims: folders in the place of claims, by volume.
        """
        self.pods.append(Pod(self, objects, secrets, claims))
        return self.pods[-1]

    def close(self) -> None:
        """Ends every process, and leaves nothing behind."""
        for pod in self.pods:
            pod.kill()
        self._network.kill()
        self._network.wait()
        shutil.rmtree(self.folder)


class Pod:
    """Containers that share volumes and the network."""

    def __init__(
        self,
        cluster: Cluster,
        objects: list[Object],
        secrets: Mapping[str, Mapping[str, bytes]],
        claims: Mapping[str, Path],
    ) -> None:
        self.name = str(kind(objects, "StatefulSet")["metadata"]["name"])
        self._cluster = cluster
        self._spec = pod_of(objects)
        self._folder = cluster.folder / self.name
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        config = {name: text.encode() for name, text in kind(objects, "ConfigMap")["data"].items()}
        for volume in [*self._spec["volumes"], {"name": "state"}]:
            path = self.volume(volume["name"])
            path.mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                _project(path, config, 0o644)
            elif "secret" in volume:
                items = [item["key"] for item in volume["secret"]["items"]]
                given = secrets[volume["secret"]["secretName"]]
                _project(path, {name: given[name] for name in items}, 0o440)
            elif volume["name"] in claims:
                shutil.copytree(claims[volume["name"]], path, dirs_exist_ok=True)
                # What is only read keeps its modes; docs/deploy/kubernetes.md asks for such.
                subprocess.run(["chmod", "-R", "a+rX", path], check=True)
            # fsGroup, as a kubelet sets it.
            os.chown(path, 0, self._spec["securityContext"]["fsGroup"])
            path.chmod(0o2777 if "emptyDir" in volume else 0o2775)
        # A kubelet makes a missing subPath with the mode of its volume.
        for mount in [m for c in self._spec["containers"] for m in c["volumeMounts"]]:
            if mount["name"] == "state" and "subPath" in mount:
                part = self.volume("state") / mount["subPath"]
                part.mkdir(exist_ok=True)
                os.chown(part, 0, self._spec["securityContext"]["fsGroup"])
                part.chmod(0o2775)

    def volume(self, name: str) -> Path:
        """The folder of a volume, as root sees it."""
        return self._folder / "volumes" / name

    def start(self) -> None:
        """The init containers one after another, then the others."""
        for container in self._spec["initContainers"]:
            done = subprocess.run(
                self._command(container, container["command"]), capture_output=True, text=True
            )
            assert done.returncode == 0, (container["name"], done.stderr)
        for container in self._spec["containers"]:
            with (self._folder / f"{container['name']}.log").open("ab") as log:
                self._running[container["name"]] = subprocess.Popen(
                    self._command(container, container["command"]), stdout=log, stderr=log
                )

    def instead(self, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """Another command in a container's place, until it ends."""
        return subprocess.run(
            self._command(self._container(name), command),
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGING,
        )

    def exec(
        self, name: str, *command: str, data: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """`kubectl exec`: a command beside a container's process."""
        entry = ["nsenter", f"--target={self.process(name)}", "--mount", "--pid", "--net"]
        inside = self._become(self._container(name), command)
        folder = ["sh", "-c", 'cd "$0" && exec "$@"', self._container(name)["workingDir"]]
        return subprocess.run(
            [*entry, "--", *folder, *inside],
            input=data,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGING,
        )

    def probe(self, name: str, which: str) -> int:
        """The exit code of a container's probe."""
        return self.exec(name, *self._container(name)[which]["exec"]["command"]).returncode

    def process(self, name: str) -> int:
        """The number of a container's own process, as seen from here."""
        outer = self._running[name].pid
        deadline = time.monotonic() + HANGING
        while time.monotonic() < deadline:
            assert self._running[name].poll() is None, self.logs()
            for child in _children(outer):
                # Not while its root is still being made.
                if _arguments(child)[0] == self._container(name)["command"][0]:
                    return child
            time.sleep(0.05)
        raise AssertionError(self.logs())

    def running(self, name: str) -> bool:
        """Whether a container's process has not ended."""
        return self._running[name].poll() is None

    def logs(self) -> str:
        """What every container said."""
        texts = (f"--- {path}\n{path.read_text()[-3000:]}" for path in self._folder.glob("*.log"))
        return "\n".join(texts)

    def kill(self) -> None:
        """Every container at once."""
        for process in self._running.values():
            # A container's first process: with it all others end, and so does what waits for it.
            for child in _children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()
        self._running.clear()

    def _container(self, name: str) -> Object:
        every = [*self._spec["initContainers"], *self._spec["containers"]]
        found: Object = next(container for container in every if container["name"] == name)
        return found

    def _command(self, container: Object, command: "list[str] | tuple[str, ...]") -> list[str]:
        mounts = " ".join(
            f"{self.volume(mount['name']) / mount.get('subPath', '')}:{mount['mountPath']}"
            f"{':ro' * mount.get('readOnly', 0)}"
            for mount in container["volumeMounts"]
        )
        base = self._folder / "roots" / container["name"]
        base.mkdir(parents=True, exist_ok=True)
        places = [base, sys.base_prefix, Path(sys.prefix) / "lib", ROOT]
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]
        return [
            *self._cluster.entry(), *spaces, "sh", "-c", _ROOT, "sh", *map(str, places), mounts,
            container.get("workingDir", "/"), *self._become(container, command),
        ]  # fmt: skip

    def _become(self, container: Object, command: "list[str] | tuple[str, ...]") -> list[str]:
        security = container["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["allowPrivilegeEscalation"] is False
        user, group = security["runAsUser"], security["runAsGroup"]
        groups = self._spec["securityContext"]["fsGroup"]
        return [
            "setpriv", f"--reuid={user}", f"--regid={group}", f"--groups={groups}",
            "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs",
            "env", "-i", *(f"{name}={value}" for name, value in _ENVIRONMENT.items()),
            "/opt/umbel/bin/python", "-c", _BECOME, *command,
        ]  # fmt: skip


def _project(path: Path, files: Mapping[str, bytes], mode: int) -> None:
    """As a kubelet lays a ConfigMap or a Secret: links, of which one is exchanged for all."""
    data = path / "..1"
    data.mkdir(mode=0o755)
    for name, content in files.items():
        (data / name).write_bytes(content)
        os.chown(data / name, 0, GROUP)
        (data / name).chmod(mode)
        (path / name).symlink_to(f"..data/{name}")
    (path / "..data").symlink_to("..1")


def _children(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def _arguments(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
