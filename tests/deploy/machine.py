"""A machine of its own for a test: systemd as its first process, over this machine's files.

Namespaces and an overlay: what happens in it changes nothing here. Its network is this machine's,
so that daemons inside and outside reach each other. It needs root and a kernel with overlayfs.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.waiting import HANGING

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "client", "server")
_SYSTEMD = Path("/lib/systemd/systemd")

_BOOT = r"""
set -eu
base=$1 python=$2 libraries=$3 source=$4 groups=$5
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
cd "$base/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup
for group in $groups; do
    mkdir "sys/fs/cgroup/${group%%:*}"
    if [ "${group#*:}" = v2 ]; then
        mount -t cgroup2 cgroup2 "sys/fs/cgroup/${group%%:*}"
    else
        mount -t cgroup -o "${group#*:}" cgroup "sys/fs/cgroup/${group%%:*}"
    fi
done
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"
done
ln -s null dev/console
mkdir -p opt/python opt/umbel/bin opt/umbel/lib opt/umbel-source
mount --bind "$python" opt/python
mount --bind "$libraries" opt/umbel/lib
mount --bind "$source" opt/umbel-source
mount -o remount,bind,ro opt/umbel-source
printf 'home = /opt/python/bin\n' > opt/umbel/pyvenv.cfg
ln -s /opt/python/bin/python3 opt/umbel/bin/python
mkdir .former
pivot_root . .former
umount -l /.former
# What this machine starts by itself is of no use here: nothing past basic.target.
exec env -i container=umbel PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target
"""


def missing() -> str | None:
    """Why this machine can hold no other; None: it can."""
    if os.geteuid() != 0:
        return "only root makes namespaces and users"
    if not _SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--cgroup", "true"])
    return None if tried.returncode == 0 else "this process may make no namespaces"


class Machine:
    """Runs until `close`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="umbel-machine-"))
        self._hierarchies = list(_hierarchies())
        name = f"umbel-{uuid.uuid4().hex[:12]}"
        self._groups = [path / name for path, _ in self._hierarchies]
        for group in self._groups:
            group.mkdir()
        self._outer = self._boot()
        self.first = self._first_process()
        """The number of its systemd, as seen from here."""
        self._prepare()

    def run(
        self, *command: str | Path, user: str | None = None, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command in it; as root, or as a user with all of their groups."""
        prefix = () if user is None else ("setpriv", f"--reuid={user}", f"--regid={user}")
        groups = () if user is None else ("--init-groups",)
        done = subprocess.run(
            [*self._entry(), *prefix, *groups, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGING,
        )
        if check and done.returncode != 0:
            raise AssertionError((command, done.returncode, done.stdout, done.stderr))
        return done

    def python(
        self, *arguments: str | Path, user: str | None = None, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Runs Python in it, with Umbel's packages."""
        return self.run(
            "env", SOURCE_PATH, "/opt/umbel/bin/python", *arguments, user=user, check=check
        )

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Writes a file of root's in it."""
        target = self.inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(mode)

    def inside(self, path: str) -> Path:
        """Where a file of its is, as seen from here."""
        return Path(f"/proc/{self.first}/root") / path.lstrip("/")

    def log(self, unit: str) -> str:
        """What a unit said."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def close(self) -> None:
        """Ends every process in it, and leaves nothing behind."""
        os.kill(self.first, signal.SIGKILL)
        self._outer.wait(HANGING)
        deadline = time.monotonic() + HANGING
        for group in self._groups:
            folders = sorted(group.rglob("*"), key=lambda path: -len(path.parts))
            for folder in (*(path for path in folders if path.is_dir()), group):
                while True:
                    try:
                        folder.rmdir()
                        break
                    except OSError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.05)
        self._folder.rmdir()

    def _entry(self) -> Sequence[str]:
        return ["nsenter", f"--target={self.first}", "--mount", "--pid", "--ipc", "--uts", "--"]

    def _boot(self) -> "subprocess.Popen[bytes]":
        groups = " ".join(f"{path.name}:{kind}" for path, kind in self._hierarchies)
        join = "".join(f"echo $$ > {group}/cgroup.procs\n" for group in self._groups)
        spaces = "--mount --pid --ipc --uts --cgroup --fork --kill-child=KILL"
        script = f'{join}exec unshare {spaces} sh -c "$0" sh "$@"'
        arguments = [self._folder, sys.base_prefix, Path(sys.prefix) / "lib", ROOT, groups]
        return subprocess.Popen(
            ["sh", "-c", script, _BOOT, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def _first_process(self) -> int:
        deadline = time.monotonic() + HANGING
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
            assert self._outer.poll() is None, "the machine did not start"
            time.sleep(0.05)
        raise AssertionError("the machine did not start")

    def _prepare(self) -> None:
        deadline = time.monotonic() + HANGING
        while True:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            if state in ("running", "degraded"):
                break
            assert time.monotonic() < deadline, state
            time.sleep(0.1)


SOURCE_PATH = "PYTHONPATH=" + ":".join(f"/opt/umbel-source/{name}" for name in PACKAGES)


def _hierarchies() -> Iterator[tuple[Path, str]]:
    """Where control groups are mounted, and as what: `v2`, or a hierarchy's name of old."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        where, (system, _, options) = Path(fields.split()[4]), kind.split()
        if system == "cgroup2":
            yield where, "v2"
        elif system == "cgroup" and "cpuset" not in options:
            names = [name for name in options.split(",") if name not in ("rw", "ro", "xattr")]
            yield where, ",".join(names)
