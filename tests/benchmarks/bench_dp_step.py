"""What differential privacy costs a step: `python tests/benchmarks/bench_dp_step.py` prints JSON.

A step is forward, backward, clipping, noise and Adam, on a random model of the given size with a
mean-pool head, or of a causal language model on all tokens but the first; rank 8. Ratios are to the
step of stock PEFT without privacy, and `vs_fused` to the same step through our own fused layers:
part of the gain is fusion. Opacus' two modes stand beside.

Time: one thread, processor time; the steps take turns in one process on models that share their
frozen weights, and each figure is the median over the turns of the ratio within a turn. Memory:
each kind of step in a process of its own, by how far the peak of the resident set (VmHWM) rises
above what the built model had (VmRSS).
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_masking import entry
from opacus.grad_sample import GradSampleHooks, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.token_loss import token_losses

LABELS = 4
KINDS = ("stock", "fused", "dp", "opacus_hooks", "opacus_ghost")
SETTINGS: dict[str, Any] = {"noise_multiplier": 1.0, "expected_batch_size": 8}

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    family: str
    layers: int
    width: int
    tokens: int
    records: int
    targets: str | tuple[str, ...]
    turns: int
    target: float | None
    """Highest ratio to the stock step."""


ALL, Q_V = "all-linear", ("query", "value")
CASES = {
    "bert_12x768_all": Case("bert", 12, 768, 128, 8, ALL, 4, 1.00),
    "bert_12x768_qv": Case("bert", 12, 768, 128, 8, Q_V, 2, None),
    "bert_4x256_all": Case("bert", 4, 256, 32, 8, ALL, 25, None),
    "bert_2x128_all": Case("bert", 2, 128, 16, 8, ALL, 100, 1.10),
    "llama_3x768_all": Case("llama", 3, 768, 256, 4, ALL, 6, 1.00),
    "causal_lm_6x576_all": Case("causal-lm", 6, 576, 128, 8, ALL, 4, 1.00),
}
MEMORY_TARGETS = {"bert_12x768_all": 1.02, "causal_lm_6x576_all": 1.02}
VOCABULARY = {"causal-lm": 49_152}
"""Of SmolLM2, whose width the case has too; for the others it hardly matters."""


class Classifier(nn.Module):
    """A PEFT model with a trained head on the mean of its token vectors."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=_targets(case))
        with warnings.catch_warnings():
            # PEFT asks Transformers for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            self.base = get_peft_model(_base(case), config)
        self.head = nn.Linear(case.width, LABELS)
        self.ids = torch.randint(0, 1000, (case.records, case.tokens))
        self.labels = torch.randint(0, LABELS, (case.records,))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """float32[n, labels]."""
        logits: torch.Tensor = self.head(self.base(input_ids=ids)[0].mean(1))
        return logits

    def losses(self) -> torch.Tensor:
        """float32[n]."""
        return nn.functional.cross_entropy(self(self.ids), self.labels, reduction="none")

    def losses_at_a_site(self) -> torch.Tensor:
        """The same as a site computes them."""
        return self.losses()

    def adam(self) -> torch.optim.Optimizer:
        """The site's optimiser, over what is trained."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class LanguageModel(Classifier):
    """A PEFT model that is to say the next token."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        del self.head, self.labels

    def losses(self) -> torch.Tensor:
        """float32[n]: the mean over each record's tokens."""
        logits = self.base(input_ids=self.ids, use_cache=False)[0][:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none"
        )
        return losses.view(len(self.ids), -1).mean(1)

    def losses_at_a_site(self) -> torch.Tensor:
        base: Any = self.base.get_base_model()
        hidden = base.model(input_ids=self.ids, use_cache=False)[0][:, :-1]
        losses = token_losses(hidden.flatten(0, 1), base.lm_head, self.ids[:, 1:].flatten())
        return losses.view(len(self.ids), -1).mean(1)


def model_of(case: Case) -> Classifier:
    """The case's model, as PEFT makes it."""
    return LanguageModel(case) if case.family == "causal-lm" else Classifier(case)


def _targets(case: Case) -> str | list[str]:
    return case.targets if isinstance(case.targets, str) else list(case.targets)


def _base(case: Case) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY.get(case.family, 1000),
        "hidden_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.width // 64,
    }
    if case.family == "causal-lm":
        width = 8 * case.width // 3
        return LlamaForCausalLM(
            LlamaConfig(**sizes, intermediate_size=width, tie_word_embeddings=True)
        )
    if case.family == "llama":
        return LlamaModel(LlamaConfig(**sizes, intermediate_size=8 * case.width // 3))
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, intermediate_size=4 * case.width)
    return BertModel(config, add_pooling_layer=False)


def plain_step(model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Without privacy."""
    model.losses().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_step(model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Without privacy, where our layers were told that the whole batch is one record."""
    model.losses_at_a_site().mean().backward()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad, parameter.grad_sample = parameter.grad_sample[0], None
    optimizer.step()
    optimizer.zero_grad()


def private_step(model: Classifier, optimizer: PrivateOptimizer, noise: StepNoise) -> None:
    """As a site takes it. It ends when the next step's noise is drawn, which it has to pay for."""
    losses = model.losses_at_a_site()
    losses.sum().backward()
    optimizer.accumulate(len(losses))
    optimizer.step()
    noise.wait()


def opacus_step(model: Classifier, optimizer: DPOptimizer) -> None:
    """Opacus' hooks, optimiser and noise."""
    model.losses().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def ghost_step(
    model: Classifier, wrapped: GradSampleModuleFastGradientClipping, optimizer: DPOptimizer
) -> None:
    """Opacus' ghost clipping: norms first, then a second backward pass over weighted losses."""
    logits = wrapped(model.ids)
    losses = nn.functional.cross_entropy(logits, model.labels, reduction="none")
    DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
    optimizer.step()
    optimizer.zero_grad()


def step_of(kind: str, model: Classifier, attached: ExitStack) -> Step:
    """A step of one kind on this model, which is from then on of that kind."""
    adam = model.adam()
    if kind == "stock":
        return partial(plain_step, model, adam)
    if kind == "opacus_hooks":
        GradSampleHooks(model, loss_reduction="sum")
        return partial(opacus_step, model, DPOptimizer(adam, max_grad_norm=1.0, **SETTINGS))
    if kind == "opacus_ghost":
        wrapped = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )
        ghost = DPOptimizerFastGradientClipping(adam, max_grad_norm=1.0, **SETTINGS)
        return partial(ghost_step, model, wrapped, ghost)
    attached.enter_context(per_record_gradients(model))
    if kind == "fused":
        for module in model.modules():
            if "forward" in vars(module):
                vars(module)["forward"] = partial(_as_one_record, vars(module)["forward"])
        return partial(fused_step, model, adam)
    parameters = [p for group in adam.param_groups for p in group["params"]]
    noise = attached.enter_context(StepNoise(os.urandom, parameters, steps=1 << 30))
    private = PrivateOptimizer(adam, noise, clip_norm=1.0, **SETTINGS)
    return partial(private_step, model, private, noise)


def _as_one_record(
    forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    output = forward(inputs.reshape(1, -1, inputs.shape[-1]))
    return output.view(*inputs.shape[:-1], -1)


def ratios(case: Case) -> dict[str, float]:
    """Median ratio of each kind's processor time to the stock step's, and `dp` to `fused`."""
    first = model_of(case)
    # Ghost clipping weights losses by record, and knows none over tokens.
    kinds = [kind for kind in KINDS if (kind, case.family) != ("opacus_ghost", "causal-lm")]
    frozen = {id(p): p for p in first.parameters() if not p.requires_grad}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as attached:
        models = {kind: copy.deepcopy(first, dict(frozen)) for kind in kinds}
        steps = {kind: step_of(kind, model, attached) for kind, model in models.items()}
        for _ in range(1 + case.turns):
            for kind, step in steps.items():
                start = time.process_time()
                step()
                seconds[kind].append(time.process_time() - start)
    return {
        kind: _median_ratio(seconds[kind], seconds["stock"]) for kind in kinds if kind != "stock"
    } | {"dp_vs_fused": _median_ratio(seconds["dp"], seconds["fused"])}


def _median_ratio(times: list[float], others: list[float]) -> float:
    """The first turn warms up."""
    return statistics.median(a / b for a, b in zip(times[1:], others[1:], strict=True))


def memory(case: str, kind: str) -> int:
    """Bytes of a fresh process that two steps need above the built model."""
    command = [sys.executable, __file__, case, kind]
    # What is freed goes back to the system at once, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


def print_memory(case: str, kind: str) -> None:
    """What the process of `memory` does."""
    with ExitStack() as attached:
        step = step_of(kind, model_of(CASES[case]), attached)
        # Building may have needed more than what remains: the peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        for _ in range(2):
            step()
        print(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    torch.set_num_threads(1)
    figures = {}
    for name, case in CASES.items():
        found = ratios(case)
        figures |= {
            f"dp_step_ratio_{name}": entry(found["dp"], "of PEFT's step", case.target),
            f"dp_step_ratio_{name}_vs_fused": entry(found["dp_vs_fused"], "of fused step", None),
            f"fused_step_ratio_{name}": entry(found["fused"], "of PEFT's step", None),
            f"opacus_hooks_ratio_{name}": entry(found["opacus_hooks"], "of PEFT's step", None),
        }
        if "opacus_ghost" in found:
            ghost = entry(found["opacus_ghost"], "of PEFT's step", None)
            figures[f"opacus_ghost_ratio_{name}"] = ghost
    for case_name, most in MEMORY_TARGETS.items():
        stock = memory(case_name, "stock")
        for kind, target in (("dp", most), ("opacus_hooks", None)):
            ratio = memory(case_name, kind) / stock
            figures[f"{kind}_memory_ratio_{case_name}"] = entry(ratio, "of PEFT's peak", target)
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print_memory(*sys.argv[1:])
    else:
        print(json.dumps(measure(), indent=2))
