"""What an approval may write into a site's policy: values that the policy does not have.

This module is part of the core of the privacy guarantee. Never change a value that is there, and
never write anything that a person did not see whole and agree to.
"""

from pathlib import Path
from typing import Any, TypeAlias

import tomlkit
from tomlkit.exceptions import TOMLKitError

from umbel_common.errors import ConfigError, StorageError
from umbel_common.plans.plan import CausalLm, Classification, TrainingPlan
from umbel_host.files.durable import replace
from umbel_host.files.text_file import read_text

Values: TypeAlias = dict[str, tuple[str, ...] | tuple[int, ...]]
"""Values by the names of fields of a policy."""


class PolicyFile:
    """The file with a site's policy: client.toml, or the one that client.toml names."""

    def __init__(self, config: Path) -> None:
        """Reads the policy of this client.toml.

        Raises:
            ConfigError: a file is not TOML, or has no policy.
            IdentityError: a file cannot be read.
        """
        self.path = config
        self._document = _parsed(config)
        self._table: Any = self._document.get("policy")
        if isinstance(self._table, str):
            self.path = config.absolute().parent / Path(self._table).expanduser()
            self._document = self._table = _parsed(self.path)
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
            StorageError: the file cannot be written.
        """
        for name, value in values.items():
            if self._has(name):
                raise ConfigError(
                    "a policy has this field already, and an approval changes none",
                    file=self.path,
                    field=name,
                )
            self._table[name] = list(value)
        try:
            replace(self.path, tomlkit.dumps(self._document).encode())
        except OSError as error:
            raise StorageError(
                "a policy cannot be written", file=self.path, found=error.strerror
            ) from None

    def _has(self, name: str) -> bool:
        return name in self._table and (name != "labels" or bool(self._table[name]))


def _parsed(path: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(read_text(path))
    except TOMLKitError as error:
        raise ConfigError("a configuration is not TOML", file=path, found=error) from None
