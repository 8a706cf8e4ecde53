"""Scores adapters in a process with the client's packages; the server must never import them.

`umbel_client.evaluating` describes the request. If that process crashes, only the one evaluation is
lost.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from umbel_common.adapters.vector import Vector, to_bytes
from umbel_common.errors import ConfigError, DataError, StorageError, UmbelError
from umbel_common.plans.figures import Evaluation
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.plans.requests import EvaluationRequest, HoldoutColumns
from umbel_host.files.durable import create
from umbel_host.installation import install
from umbel_host.processes.lifecycle import require_own
from umbel_host.processes.supervisor import bound_to_parent, our_module
from umbel_server.messaging.link import JobStopped
from umbel_server.operator.config import EvaluationConfig

_POLL_SECONDS = 0.5
_LONGEST_REASON = 2000


class ProcessEvaluator:
    """The `Evaluator` of a server: it starts one process for each evaluation."""

    def __init__(
        self,
        config: EvaluationConfig,
        scratch: Path,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        scratch: folder for the vectors while they are scored; made if it is missing.
        should_stop: whether the job is to be stopped; called again and again.
        """
        self._config = config
        self._scratch = scratch
        self._should_stop = should_stop
        self.stop_after = config.stop_after

    def check(self, plan: TrainingPlan) -> None:
        """See `Evaluator`."""
        check_evaluation(self._config, plan)

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        """See `Evaluator`."""
        # The holdout may have changed since the job began.
        self.check(plan)
        config = self._config
        request = EvaluationRequest(
            plan=plan_to_json(plan),
            adapter=self._write("adapter.f32", adapter),
            before=None if before is None else self._write("before.f32", before),
            model=config.model,
            holdout=config.holdout,
            general=config.general,
            groups=config.groups,
            columns=HoldoutColumns(
                text_column=config.text_column,
                label_column=config.label_column,
                format=config.format,
            ),
            answers=config.answers,
            answer_tokens=config.answer_tokens,
            batch_size=config.batch_size,
            device=config.device,
        )
        try:
            answer = self._ask(msgspec.json.encode(request))
            return msgspec.json.decode(answer, type=Evaluation)
        except msgspec.MsgspecError as error:
            raise _failed(f"an answer that does not decode: {error}") from None
        finally:
            for name in ("adapter.f32", "before.f32"):
                with suppress(OSError):
                    (self._scratch / name).unlink()

    def _write(self, name: str, vector: Vector) -> str:
        path = self._scratch / name
        try:
            self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_own(self._scratch)
            # What is there is of an evaluation that was cut short, or somebody's trap.
            path.unlink(missing_ok=True)
            create(path, to_bytes(vector), mode=0o600)
        except OSError as error:
            raise StorageError(
                "an adapter cannot be written for its evaluation",
                file=path,
                found=error.strerror,
            ) from None
        return str(path)

    def _ask(self, request: bytes) -> bytes:
        """Starts the process; returns what it writes on standard output."""
        python = self._config.python or sys.executable
        command = our_module("umbel_client.evaluating", python=python)
        try:
            process = subprocess.Popen(  # noqa: S603  # the operator's own Python
                bound_to_parent(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise _failed(f"{command[0]}: {error.strerror}") from None
        deadline = time.monotonic() + self._config.seconds
        rest: bytes | None = request
        try:
            while True:
                try:
                    output, complaints = process.communicate(rest, timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    rest = None
                if self._should_stop():
                    raise JobStopped
                if time.monotonic() > deadline:
                    raise _failed(f"no answer within {self._config.seconds:g} seconds")
        finally:
            if process.poll() is None:
                # Its children too: they hold its pipes open.
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            raise _failed(_reason(process.returncode, complaints))
        return output


def check_evaluation(config: EvaluationConfig | None, plan: TrainingPlan) -> None:
    """Refuses a configuration that cannot evaluate the adapters of a plan.

    Args:
        config: None if the server evaluates nothing.

    Raises:
        ConfigError: the plan has a release gate, and the server evaluates nothing; or the packages
            for evaluation are missing.
        DataError: the holdout is missing, or is not the one that the plan's release gate names.
    """
    if config is None:
        if plan.release_gate is None:
            return
        raise ConfigError(
            "the plan has a release gate, and this server does not evaluate adapters",
            field="evaluation",
            found="none",
            accepted="a table [evaluation] in server.toml with the plan's holdout",
            remedy="add the table, or agree on a plan without release_gate",
        )
    if config.python is None and find_spec("torch") is None:
        raise ConfigError(
            "adapters are evaluated with the client's packages, which are not installed here",
            field="evaluation.python",
            found="none",
            remedy=f"{install('client')}, into an environment of its own, and its Python in"
            " evaluation.python",
        )
    if config.python is not None and not Path(config.python).is_file():
        raise ConfigError(
            "the Python that evaluates adapters does not exist",
            field="evaluation.python",
            found=config.python,
        )
    found = _file_digest(Path(config.holdout))
    if plan.release_gate is not None and found != plan.release_gate.holdout:
        raise DataError(
            "the holdout is not the one that the plan's release gate names",
            file=config.holdout,
            field="evaluation.holdout",
            found=found.hex(),
            accepted=plan.release_gate.holdout.hex(),
            remedy="restore the file that the plan was made with",
        )


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(
            "the holdout cannot be read",
            file=path,
            field="evaluation.holdout",
            found=error.strerror,
        ) from None


def _reason(code: int, complaints: bytes) -> str:
    """Returns the error that the process reported, without the warnings before it."""
    text = complaints.decode("utf-8", "replace").strip()
    _, marker, said = text.rpartition("error: ")
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{end}: {(said if marker else text)[-_LONGEST_REASON:] or 'no message'}"


def _failed(reason: str) -> UmbelError:
    return UmbelError("the evaluation of an adapter failed", found=reason)
