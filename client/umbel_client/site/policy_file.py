"""What an approval may write into a site's policy: values that the policy does not have.

This module is part of the core of the privacy guarantee. Never change a value that is there, and
never write anything that a person did not see whole and agree to.
"""

import os
from pathlib import Path
from typing import Any, TypeAlias

import tomlkit
from tomlkit.exceptions import TOMLKitError

from umbel_common.errors import ConfigError, StorageError
from umbel_common.plans.plan import CausalLm, Classification, TrainingPlan
from umbel_host.files.durable import replace
from umbel_host.files.text_file import from_home, read_text

Values: TypeAlias = dict[str, tuple[str, ...] | tuple[int, ...]]
"""Values by the names of fields of a policy."""


class PolicyFile:
    """The file with a site's policy: client.toml, or the one that client.toml names."""

    def __init__(self, config: Path) -> None:
        """Reads the policy of this client.toml.

        Raises:
            ConfigError: a file cannot be read, is not TOML, or has no policy.
        """
        self.path, self._text = config, read_text(config, ConfigError)
        self._document = _parsed(self._text, config)
        self._table: Any = self._document.get("policy")
        if isinstance(self._table, str):
            self.path = config.absolute().parent / from_home(self._table, config, field="policy")
            self._text = read_text(self.path, ConfigError)
            self._document = self._table = _parsed(self._text, self.path)
        if self._table is None:
            raise ConfigError("a configuration has no policy", file=config, field="policy")

    def missing(self, plan: TrainingPlan) -> Values:
        """The plan's labels, length and template, where the policy has no such field.

        With these values the policy allows this plan's, and no others. An empty list of labels
        allows no classification, and counts as missing.
        """
        task = plan.task
        asked: Values = {"max_tokens": (task.max_tokens,)}
        if isinstance(task, Classification):
            asked = {"labels": task.labels, **asked}
        elif isinstance(task, CausalLm):
            asked["templates"] = (task.template,)
        return {name: value for name, value in asked.items() if not self._has(name)}

    def add(self, values: Values) -> None:
        """Adds values; everything else in the file stays as it is, comments included.

        Raises:
            ConfigError: one of the fields is there already; nothing is written.
            StorageError: the file cannot be written, is a link or another user's, or was changed
                since it was read; nothing is written.
        """
        for name, value in values.items():
            if self._has(name):
                raise ConfigError(
                    "a policy has this field already, and an approval changes none",
                    file=self.path,
                    field=name,
                )
            self._table[name] = list(value)
        self._require_own()
        try:
            replace(self.path, tomlkit.dumps(self._document).encode())
        except OSError as error:
            raise StorageError(
                "a policy cannot be written", file=self.path, found=error.strerror
            ) from None

    def _require_own(self) -> None:
        """Refuses a file whose owner, or whose text, is not what a person here was asked about."""
        try:
            own = not self.path.is_symlink() and self.path.stat().st_uid == os.geteuid()
        except OSError as error:
            found: str | None = error.strerror
        else:
            found = None if own else "a link, or a file of another user"
        if found is None and read_text(self.path, ConfigError) != self._text:
            found = "it was changed while you were asked"
        if found is not None:
            raise StorageError(
                "a policy cannot be written, and stays as it is",
                file=self.path,
                found=found,
                remedy="let its owner write these values into it",
            )

    def _has(self, name: str) -> bool:
        return name in self._table and (name != "labels" or bool(self._table[name]))


def _parsed(text: str, path: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(text)
    except TOMLKitError as error:
        raise ConfigError("a configuration is not TOML", file=path, found=error) from None
