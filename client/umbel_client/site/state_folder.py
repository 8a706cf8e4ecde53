"""The names of everything in a site's state folder, once for all of the code."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StateFolder:
    """Where each part of a site's state is; nothing here touches the disk."""

    root: Path

    @property
    def ledger(self) -> Path:
        """What was spent on the data set."""
        return self.root / "ledger.sqlite"

    @property
    def journal(self) -> Path:
        """Attempts, answers and releases."""
        return self.root / "session.sqlite"

    @property
    def decisions(self) -> Path:
        """What the site's people decided: approved plans, waiting plans, a pause."""
        return self.root / "decisions"

    @property
    def adapters(self) -> Path:
        """The adapters that the site received, in a folder for each job."""
        return self.root / "adapters"

    def kept_adapter(self, job: str) -> Path:
        """The adapter of the newest release of a job under way; an operator can send it again."""
        return self.root / "releases" / f"{job}.safetensors"

    @property
    def cache(self) -> Path:
        """Outputs of the frozen layers for the site's own records; they can be computed again."""
        return self.root / "cache"

    @property
    def control_socket(self) -> Path:
        """Where the site's own people reach the trainer; closed to everybody else."""
        return self.root / "control.sock"

    @property
    def lock(self) -> Path:
        """The file that a running trainer locks."""
        return self.root / "trainer.lock"

    def deltas(self, job: str) -> Path:
        """Folder of a job's deltas and optimizer states."""
        return self.root / "deltas" / job

    def adapter(self, job: str) -> Path:
        """Folder of the adapter that a job gave this site."""
        return self.adapters / job
