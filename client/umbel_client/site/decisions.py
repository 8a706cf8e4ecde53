"""What the site's people decide: whether the trainer may begin anything, and which plans may run.

This module is part of the core of the privacy guarantee. Never let a plan that waits for a decision
run, and never let a server's word stand for a decision.

Decisions are files in the site's own state folder, which only its own people and its trainer can
write. A server cannot change them, and the relay cannot reach them.
"""

from dataclasses import dataclass
from pathlib import Path

from umbel_client.site.state_folder import StateFolder
from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import PolicyRefusal, RemoteProtocolError, StorageError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.trust.identity import Signed
from umbel_host.files.durable import replace, sync_folder

MOST_WAITING = 20
"""Most plans that may wait for a decision: a server could fill the disk with proposals."""


@dataclass(frozen=True)
class Proposal:
    """A plan that waits for a person."""

    plan: TrainingPlan
    digest: bytes


class Decisions:
    """The decisions of one site, on disk; they are read again at each question."""

    def __init__(self, state: StateFolder) -> None:
        self._folder = state.decisions
        self._approved = self._folder / "approved"
        self._waiting = self._folder / "waiting"
        self._pause = self._folder / "paused"

    @property
    def is_paused(self) -> bool:
        """Whether the trainer is to begin nothing new."""
        return self._pause.exists()

    def pause(self) -> None:
        """Lets nothing new begin from now on; a round under way is finished.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(self._pause, b"")

    def resume(self) -> None:
        """Undoes `pause`."""
        self._remove(self._pause)

    def require_running(self) -> None:
        """Refuses to begin anything while the site is paused.

        Raises:
            PolicyRefusal: `site-paused`.
        """
        if self.is_paused:
            raise PolicyRefusal(
                "site-paused",
                "this site is paused by its own people",
                file=self._pause,
                remedy="umbel-client resume",
            )

    def is_approved(self, plan: TrainingPlan) -> bool:
        """Whether a person has approved this plan."""
        return (self._approved / plan.digest().hex()).exists()

    def require_approval(self, plan: TrainingPlan, signed: Signed) -> None:
        """Refuses a plan that no person approved, and keeps it for their decision.

        Args:
            signed: the plan as the operator signed it, verified.

        Raises:
            PolicyRefusal: `awaiting-approval`, or `too-many-waiting`.
            StorageError: the plan cannot be kept.
        """
        if self.is_approved(plan):
            return
        digest = plan.digest()
        waiting = self._waiting / digest.hex()
        if not waiting.exists():
            if len(self._names(self._waiting)) >= MOST_WAITING:
                raise PolicyRefusal(
                    "too-many-waiting",
                    "too many plans wait for approval at this site",
                    file=self._waiting,
                    accepted=f"at most {MOST_WAITING}",
                    remedy="umbel-client plans; approve or reject them",
                )
            self._write(waiting, encode(signed))
        raise PolicyRefusal(
            "awaiting-approval",
            "a plan waits for the approval of this site's people",
            field=plan.job,
            found=digest.hex(),
            remedy=f"umbel-client approve {plan.job}",
        )

    def proposals(self) -> list[Proposal]:
        """The plans that wait, by job.

        Raises:
            StorageError: the file of one of them is damaged.
        """
        found = [self._proposal(self._waiting / name) for name in self._names(self._waiting)]
        return sorted(found, key=lambda proposal: proposal.plan.job)

    def approve(self, digest: bytes) -> None:
        """Allows the plan of this digest, and no other, from now on.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(self._approved / digest.hex(), b"")
        self._remove(self._waiting / digest.hex())

    def reject(self, digest: bytes) -> None:
        """Takes a plan off the list; the server may propose it again."""
        self._remove(self._waiting / digest.hex())

    def _proposal(self, path: Path) -> Proposal:
        try:
            signed = decode_canonical(path.read_bytes(), Signed)
            plan = decode_canonical(signed.statement, PLAN_VERSIONS)
        except (OSError, RemoteProtocolError) as error:
            raise StorageError(
                "a plan that waits for approval cannot be read",
                file=path,
                found=error.strerror if isinstance(error, OSError) else error.check,
                remedy="remove the file; the server proposes the plan again",
            ) from None
        return Proposal(plan, plan.digest())

    def _names(self, folder: Path) -> list[str]:
        return [path.name for path in folder.iterdir()] if folder.exists() else []

    def _write(self, path: Path, data: bytes) -> None:
        try:
            for folder in (self._folder, path.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            replace(path, data)
        except OSError as error:
            raise StorageError(
                "a decision of this site cannot be written", file=path, found=error.strerror
            ) from None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            if path.parent.exists():
                sync_folder(path.parent)
        except OSError as error:
            raise StorageError(
                "a decision of this site cannot be undone", file=path, found=error.strerror
            ) from None
