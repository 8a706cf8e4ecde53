"""`make gpu-check`: checks and measures training on one GPU, and writes docs/benchmarks/gpu.json.

It needs no network and no data: models and records are random. It ends by itself within its limit
of time. Parts run in the order of their worth. The file is written again after each part, so a run
that is cut short leaves what it found. A part that does not fit into the time, or needs a package
that is not there, is written as "not run" with its reason.

The parts run in a process of their own (`--worker`). A part that raises or hangs ends that process,
and a new one continues with the next part: after an error of a kernel, CUDA gives a process wrong
results.

Exit codes: 0: no bound is missed; 1: a bound is missed, a part failed, or no part could run; 2:
there is no such device, and nothing is written.
"""

import argparse
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CODE = [ROOT / "common", ROOT / "server", ROOT / "client", ROOT / "simulations", ROOT / "tests"]
"""What the worker imports, whether or not Umbel is installed."""

LIMIT = 280.0
"""Seconds of the whole check. Installing wheels comes before, and both end within five minutes."""
PART_LIMIT = 120.0
"""Seconds after which a part is taken for one that hangs."""
PARTS = {
    "gradients": 10,
    "amplified": 10,
    "7b": 25,
    "1b": 15,
    "bert_large": 15,
    "nf4": 15,
    "out_of_memory": 10,
    "8k_tokens": 15,
    "federation": 20,
}
"""The parts in the order of their worth, with the seconds that must be left for them to start."""

_ENDING = 10.0
"""Seconds that a process which has closed its pipe may take to end."""
NO_DEVICE = 2
NO_TIME = "not run: no time left"

Message = dict[str, Any]


class Report:
    """The file of a check, and its exit code."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self.is_written = False
        """Whether a part has ended."""
        self._began = time.monotonic()
        self._document: dict[str, Any] = {
            "command": command,
            "commit": _git("rev-parse", "HEAD"),
            "clean": _git("status", "--porcelain") == "",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": 0.0,
            "machine": {},
            "parts": {},
            "figures": {},
        }

    @property
    def seconds(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self._began

    def machine(self, found: Message) -> None:
        """Takes the description of the machine, before any part."""
        self._document["machine"] = found

    def figure(self, name: str, figure: Message) -> None:
        """Takes a figure of the part under way, {value, unit, target, holds}, and prints it."""
        self._document["figures"][name] = figure
        target = "" if figure["target"] is None else f" (target {figure['target']:g})"
        verdict = {True: "holds", False: "MISSED", None: ""}[figure["holds"]]
        print(f"{name:48} {figure['value']:10.4g} {figure['unit']}{target} {verdict}", flush=True)

    def end(self, part: str, status: str, seconds: float, error: str | None = None) -> None:
        """Takes how a part ended, and writes the file.

        Args:
            status: `done`, `failed`, or `not run: ` and the reason.
            error: what a part that failed raised.
        """
        entry = {"status": status, "seconds": round(seconds, 1)}
        self._document["parts"][part] = entry if error is None else {**entry, "error": error}
        print(f"-- {part}: {status}, {seconds:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file; readers see the former content or the new one."""
        self._document["seconds"] = round(self.seconds, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(self._document, indent=2) + "\n")
        os.replace(partial, self._path)
        self.is_written = True

    def exit_code(self) -> int:
        """1 if a bound is missed, a part failed, or no part could run; else 0."""
        ends = [part["status"] for part in self._document["parts"].values()]
        missed = any(one["holds"] is False for one in self._document["figures"].values())
        return int(missed or "failed" in ends or "done" not in ends)


class Worker:
    """A process that runs parts one after the other, and tells what it finds."""

    def __init__(self, command: Sequence[str], parts: Sequence[str]) -> None:
        """Args:
        command: what starts it; the descriptor for its messages and the parts are added.
        """
        self._messages, theirs = os.pipe()
        folders = [str(folder) for folder in CODE]
        if os.environ.get("PYTHONPATH"):
            folders.append(os.environ["PYTHONPATH"])
        self._process = subprocess.Popen(
            [*command, str(theirs), *parts],
            pass_fds=[theirs],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            # A group of its own, which ends with it: a part may have started a process.
            start_new_session=True,
        )
        os.close(theirs)
        self._read = b""

    def message(self, until: float) -> Message | None:
        """The next message; None once the process has ended.

        Args:
            until: time on the monotonic clock.

        Raises:
            TimeoutError: there was none until then.
        """
        while b"\n" not in self._read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._messages], [], [], left)[0]:
                raise TimeoutError
            read = os.read(self._messages, 1 << 16)
            if not read:
                return None
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def end(self, seconds: float) -> int:
        """Gives the process some seconds to end, and then kills it; returns its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    def close(self) -> None:
        """Ends the process, and closes the pipe."""
        self.end(0)
        os.close(self._messages)


def check(
    path: Path,
    command: str,
    worker: Sequence[str],
    parts: dict[str, int],
    *,
    limit: float = LIMIT,
    part_limit: float = PART_LIMIT,
) -> int:
    """Runs the parts, writes `path` after each of them, and returns the exit code.

    Args:
        command: what a person types to do the same.
        worker: what starts a worker (see `Worker`).
        parts: the parts in their order, with the seconds that must be left for them to start.
        limit: seconds of the whole check.
        part_limit: seconds of a part.
    """
    report = Report(path, command)
    end = time.monotonic() + limit
    pending = list(parts)
    while pending:
        # Starting a worker takes seconds, and none of the parts would start.
        if end - time.monotonic() < min(parts[name] for name in pending):
            break
        started = Worker(worker, [f"{name}={end - parts[name]}" for name in pending])
        try:
            refused = _follow(started, report, pending, end, part_limit)
        finally:
            started.close()
        if refused is not None:
            print(f"gpu-check: {refused}", file=sys.stderr)
            if not report.is_written:
                return NO_DEVICE
            # It was there when the check began.
            for name in pending:
                report.end(name, "failed", 0.0, refused)
            pending = []
    for name in pending:
        report.end(name, NO_TIME, 0.0)
    code = report.exit_code()
    print(f"{path}: {report.seconds:.0f} s, exit code {code}")
    return code


def _follow(
    worker: Worker, report: Report, pending: list[str], end: float, part_limit: float
) -> str | None:
    """Follows a worker to its end, and takes the parts that are over out of `pending`.

    Returns:
        Why there is no such device; None if there is.
    """
    began, until = time.monotonic(), min(end, time.monotonic() + part_limit)
    while pending:
        try:
            message = worker.message(until)
        except TimeoutError:
            seconds = time.monotonic() - began
            status = NO_TIME if time.monotonic() >= end else "failed"
            error = None if status == NO_TIME else f"it did not end within {part_limit:g} s"
            report.end(pending.pop(0), status, seconds, error)
            return None
        match message:
            case None:
                code = worker.end(_ENDING)
                seconds = time.monotonic() - began
                report.end(pending.pop(0), "failed", seconds, f"the process ended: {code}")
                return None
            case {"refused": why}:
                return str(why)
            case {"machine": found}:
                report.machine(found)
            case {"begin": _}:
                began, until = time.monotonic(), min(end, time.monotonic() + part_limit)
            case {"figure": name, "entry": entry}:
                report.figure(name, entry)
            case {"status": status, **more}:
                report.end(pending.pop(0), status, time.monotonic() - began, more.get("error"))
                if status == "failed":
                    return None
    return None


def work(device: str, tiny: bool, messages: int, parts: Sequence[str]) -> int:
    """What a worker does: runs parts, and writes what it finds to a descriptor.

    Args:
        parts: `NAME=TIME`; a part does not start after that time on the monotonic clock.
    """
    out = os.fdopen(messages, "w", buffering=1)

    def tell(**message: object) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        tell(machine=_machine(device))
    except RuntimeError as error:
        tell(refused=str(error))
        return NO_DEVICE
    for part in parts:
        name, _, latest = part.partition("=")
        tell(begin=name)
        if time.monotonic() > float(latest):
            tell(status=NO_TIME)
            continue
        try:
            for figure, entry in _figures(name, device, tiny):
                tell(figure=figure, entry=entry)
        except ModuleNotFoundError as error:
            package = (error.name or str(error)).partition(".")[0]
            if package.startswith("umbel"):
                raise
            tell(status=f"not run: needs {package}")
        except Exception as error:
            from gpu_models import NotHere

            if isinstance(error, NotHere):
                tell(status=f"not run: {error}")
                continue
            traceback.print_exc()
            tell(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
            return 1
        else:
            tell(status="done")
    return 0


def _figures(part: str, device: str, tiny: bool) -> Iterator[tuple[str, Message]]:
    # Only now: its packages may be missing, which is a part's reason not to run.
    import gpu_parts

    return gpu_parts.run(part, device, tiny=tiny)


def _machine(device: str) -> Message:
    """The machine, its driver and the versions of what matters.

    Raises:
        RuntimeError: PyTorch is not there, or cannot use the device.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"this Python has no PyTorch ({error})") from None
    found: Message = {"device": device, "processor": platform.machine(), "cores": os.cpu_count()}
    builds: Any = torch.version
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            why = "was built without CUDA" if builds.cuda is None else "finds no CUDA device"
            raise RuntimeError(
                f"no GPU to check: PyTorch {torch.__version__} {why} (docs/gpu.md)."
                " GPU_CHECK_DEVICE names another device"
            )
        count = torch.cuda.device_count()
        if torch.device(device).index is not None and torch.device(device).index >= count:
            raise RuntimeError(
                f"no GPU to check: {device} is not there, and the last one is cuda:{count - 1}"
            )
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
        }
    for name in ("torch", "transformers", "peft", "opacus", "flwr", "bitsandbytes", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": builds.cuda, "python": platform.python_version()}


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if the system does not say."""
    try:
        text = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        text = ""
    if text:
        return text
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _git(*arguments: str) -> str | None:
    """What a git command prints; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def main(arguments: Sequence[str]) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="gpu.py", description="Checks training on one GPU.")
    parser.add_argument("path", type=Path, help="the JSON file to write")
    parser.add_argument("--device", default="cuda:0", help="what computes")
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args(arguments)
    if not given.tiny and not given.device.startswith("cuda"):
        # A model with 7 billion weights would fill the host's memory.
        print(
            f"gpu-check: {given.device} is no CUDA device; --tiny also takes cpu", file=sys.stderr
        )
        return NO_DEVICE
    worker = [sys.executable, __file__, "--worker", given.device, str(int(given.tiny))]
    parts = {name: PARTS[name] for name in given.parts}
    if given.tiny:
        # A test of this program, perhaps on a busy machine.
        command, slowly = "tests/benchmarks/gpu.py --tiny", 10.0
    else:
        command, slowly = "make gpu-check", 1.0
    limits = {"limit": slowly * LIMIT, "part_limit": slowly * PART_LIMIT}
    return check(given.path, command, worker, parts, **limits)


def isolated(device: str, tiny: bool) -> int:
    """What the amplifying adapter's process does: it is isolated as a trainer, and prints JSON.

    As in `umbel_client.trainer_process`, nothing that starts a thread is imported before.
    """
    from umbel_client.trainer.isolation import drop_network
    from umbel_host.processes.lifecycle import hide_memory

    out = os.dup(1)
    os.dup2(2, 1)
    refused = drop_network()
    hide_memory()
    from gpu_parts import amplified_here

    figures = list(amplified_here(device, tiny=tiny))
    with os.fdopen(out, "w") as file:
        json.dump({"refused": refused, "figures": figures}, file)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        sys.exit(work(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]), sys.argv[5:]))
    if sys.argv[1] == "--isolated":
        sys.exit(isolated(sys.argv[2], sys.argv[3] == "1"))
    sys.exit(main(sys.argv[1:]))
