"""docs/fields.md, from the classes that read the files. Run as a program, this writes the page."""

import ast
import inspect
import json
import textwrap
from pathlib import Path

import msgspec

from umbel_client.planning import distributed, draft_file
from umbel_client.site import config, policy
from umbel_common.canonical import Value
from umbel_common.plans import drafted_start, plan, server_optimizer
from umbel_server.operator import config as operator

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"

DRAFT = (
    ("at its top", draft_file.Draft),
    ("`[model]`", draft_file.DraftModel),
    ('`[task]` with `task = "classification"`', plan.Classification),
    ('`[task]` with `task = "causal-lm"`', plan.CausalLm),
    ("`[lora]`", draft_file.DraftLora),
    ("`[training]`", plan.Training),
    ('`training.optimizer` with `optimizer = "adam"`', plan.Adam),
    ('`training.optimizer` with `optimizer = "sgd"`', plan.Sgd),
    ('`training.optimizer` with `optimizer = "none"`', plan.NoOptimizer),
    ('`[privacy]` with `mode = "local"`', plan.LocalPrivacy),
    ('`[privacy]` with `mode = "distributed"`', distributed.DraftDistributed),
    ('`[privacy]` with `mode = "none"`', plan.NoPrivacy),
    ("`[aggregation]`", distributed.DraftAggregation),
    ('`[server]` with `optimizer = "average"`', server_optimizer.Average),
    ('`[server]` with `optimizer = "sgd"`', server_optimizer.ServerSgd),
    ('`[server]` with `optimizer = "adam"`', server_optimizer.ServerAdam),
    ('`[server]` with `optimizer = "yogi"`', server_optimizer.ServerYogi),
    ("`[server.schedule]`", server_optimizer.Schedule),
    ("`[evaluation]`, counts in each round", plan.FederatedEvaluation),
    ("`[release_gate]`", draft_file.DraftGate),
    ('`[start]` with `start = "label-names"`', drafted_start.DraftedLabelNames),
    ('`[start]` with `start = "released"`', drafted_start.DraftedReleased),
)
SITE = (
    ("at its top", config.ClientConfig),
    ("`[data]`", config.DataConfig),
    ("`[model]`", config.ModelConfig),
    ("`[relay]`", config.RelayConfig),
    ("`[policy]`", policy.Policy),
)
SERVER = (
    ("at its top", operator.ServerConfig),
    ("`[listen]`", operator.ListenConfig),
    ("`[limits]`", operator.Limits),
    ("`[evaluation]`", operator.EvaluationConfig),
)
HEAD = """# Every field

Each table lists the fields of one file, as the code that reads the file has them; a test holds the
two together. A field without a default must be given. Relative paths start at the file's folder.
A field that is unknown, missing or wrong is refused by its name.
"""
FILES = (
    (
        "A plan's draft",
        "The operator writes it, and `umbel-server plan new` makes a plan of it.",
        DRAFT,
    ),
    (
        "client.toml",
        "A site's configuration. Work without a federation needs `[data]` and `[model]`"
        " only (`umbel-client init --local`).",
        SITE,
    ),
    ("server.toml", "The operator's configuration, which `umbel-server init` makes.", SERVER),
)

SELF_EVIDENT = {
    "federation": "Name of the federation.",
    "job": "Name of the job; each job has a name of its own.",
    "task": "A table, below.",
    "privacy": "A table, below.",
    "evaluation": "A table, below.",
    "release_gate": "A table, below.",
    "optimizer": "A table, below.",
    "logit_scale": "Factor of the mean-pool head's input.",
    "rank": "Rank of the adapter's matrices.",
    "alpha": "Scale of the adapter: its product is multiplied by `alpha / rank`.",
    "layers": "Numbers of the layers, from 0, that get an adapter; absent: all.",
    "method": "Matrices that are trained: `both`, `ffa` (B only), `alternate` (B in odd rounds,"
    " A in even ones), or `fedsvd` (B, and the server rotates both).",
    "scaling": "`standard`, or `rank-stabilised`: `alpha` divided by the root of the rank.",
    "use_dora": "Only this value; see `modules_to_save`.",
    "lora_dropout": "Only this value; see `modules_to_save`.",
    "bias": "Only this value; see `modules_to_save`.",
    "modules_to_save": "Only this value. DoRA, dropout, trained biases and whole layers are refused"
    " with the reason.",
    "rounds": "Number of rounds of the job.",
    "local_steps": "Optimizer steps of a site in each round.",
    "adapter_learning_rate": "Learning rate of the adapter.",
    "beta1": "Decay of Adam's first moment.",
    "beta2": "Decay of Adam's second moment.",
    "momentum": "Momentum of gradient descent; 0: none.",
    "schedule": "A table, below.",
    "epsilon": "Epsilon of the whole job at each site.",
    "delta": "Delta of the whole job at each site.",
    "ring_bits": "Bits of each masked number.",
    "max_loss_increase": "Largest rise of the mean loss, in nats, of an adapter that is released.",
    "text_column": "Column with the texts.",
    "label_column": "Column with the labels.",
    "listen": "A table, below.",
    "limits": "A table, below.",
}
"""What the classes leave to their fields' names, or say to those who read the code."""


def meanings(kind: type) -> dict[str, str]:
    """What the text below each field of a class says, there or in a class that it inherits from."""
    return {
        name: text
        for one in reversed(kind.__mro__)
        if one.__module__.startswith("umbel_")
        for name, text in _own_meanings(one).items()
    }


def _own_meanings(kind: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found, name = {}, None
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            found[name] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] += " ".join(str(node.value.value).split())
    return found


def default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as TOML has it."""
    value = field.default
    if value is msgspec.NODEFAULT:
        if field.default_factory is msgspec.NODEFAULT:
            return ""
        value = field.default_factory()
    if value is None:
        return "absent"
    if isinstance(value, msgspec.Struct):
        return "defaults below"
    return f"`{json.dumps(value)}`"


def rows(kind: type) -> list[str]:
    """The lines of a class' table."""
    classes = [one for one in kind.__mro__ if issubclass(one, Value) and one is not Value]
    said = {name: text for one in reversed(classes) for name, text in meanings(one).items()}
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        meaning = said[field.name]
        if not meaning or "UNSUPPORTED" in meaning:
            meaning = SELF_EVIDENT.get(field.name, "")
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            meaning = meaning or "A table, below."
        assert meaning, (kind, field.name)
        meaning = (
            meaning.replace("|", "\\|")
            .replace("; None: ", ". None: ")
            .replace("None: ", "Absent: ")
        )
        lines.append(f"| `{field.name}` | {default(field)} | {meaning} |")
    return lines


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for title, what, tables in FILES:
        parts.append(f"\n## {title}\n\n{textwrap.fill(what, 100)}\n")
        for name, kind in tables:
            lines = rows(kind)
            if len(lines) > 2:
                parts.append(f"\n### {title}, {name}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
