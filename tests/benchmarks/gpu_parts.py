"""The parts of `make gpu-check`; `gpu.py` runs them in their order, and says what becomes of them.

A part yields figures, {value, unit, target, holds}, as soon as each is known. Tiny forms of the
parts have the same code and small models: they test this program, and measure nothing.
"""

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from bench_masking import entry
from gpu_models import (
    Device,
    NotHere,
    PrivateSteps,
    Shape,
    adapted,
    alone_and_together,
    as_a_site,
    as_stock,
    compare,
    largest_error,
    random_base,
    records,
    set_random,
    shape_of,
)
from support.amplifying import CLIPPING, RECORDS, measured
from support.small_models import save_bert

from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.base.nf4 import quantise
from umbel_client.models.base.precision import Precision, fastest_precision
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import task_of
from umbel_client.training.self_test import self_test

Figures = Iterator[tuple[str, dict[str, Any]]]

LENGTHS = [33, 64, 100, 17, 120, 48]
"""Tokens of the records whose gradients are compared with the slow truth."""
GRADIENTS, STEP, MEMORY = 1e-5, 1.05, 1.05
"""The targets: relative difference of a gradient in float32, and ratios to stock PEFT."""
ISOLATED_SECONDS = 60.0
"""The most that the isolated process may take."""
RECOVERED = 1e-5
"""Largest relative difference of a step that was done in smaller parts: sums have another order."""
FEDERATED = 0.05
"""Largest relative difference of a federation's adapter to that of the CPU, which may compute in
another precision. Another adapter altogether differs by more than 1."""


def run(part: str, device: str, *, tiny: bool) -> Figures:
    """The figures of a part.

    Raises:
        NotHere: the part cannot run on this device.
        ModuleNotFoundError: it needs a package that is not there.
    """
    torch.set_num_threads(1)
    place = Device(device)
    # cuBLAS reads its setting once, when it is first used.
    as_a_site(place)
    try:
        yield from PARTS[part](place, tiny)
    finally:
        as_a_site(place)
        place.free()


def gradients(device: Device, tiny: bool) -> Figures:
    """Each record's gradient against the slow truth: this record alone, by torch.autograd."""
    lengths = [9, 14, 24] if tiny else LENGTHS
    for name in ("small_llama", "small_bert"):
        shape = shape_of(name, tiny=tiny)
        found = {}
        for precision in _precisions(device):
            base = random_base(shape, device, torch.float32)
            model = adapted(shape, base, precision=precision)
            set_random(model)
            as_stock()
            truth, together = alone_and_together(model, lengths)
            as_a_site(device)
            found[precision] = (truth, together())
            # A site's own test, as before each job.
            limit = BatchLimit(2 if tiny else 8)
            self_test(model, 1.0, limit, entropy=os.urandom)
            kept = len(limit.choices) / len(BatchLimit(limit.records).choices)
            yield f"gpu_rows_kept_{name}_{precision}", entry(kept, "of the numbers of rows", None)
        error = largest_error(found["float32"][1], found["float32"][0])
        yield f"gpu_gradient_error_{name}_float32", _exact(error, "relative", GRADIENTS)
        if "bfloat16" in found:
            wanted, (pefts, ours) = found["float32"][0], found["bfloat16"]
            error = largest_error(ours, wanted)
            yield f"gpu_gradient_error_{name}_bfloat16", _exact(error, "relative", None)
            error = largest_error(pefts, wanted)
            yield f"gpu_peft_gradient_error_{name}_bfloat16", _exact(error, "relative", None)


def _precisions(device: Device) -> list[Precision]:
    """Those in which a site's model may compute here."""
    natively = fastest_precision(device.place) == "bfloat16" or device.place.type == "cpu"
    return ["float32", "bfloat16"] if natively else ["float32"]


def amplified(device: Device, tiny: bool) -> Figures:
    """The amplifying adapter, in a process that is isolated as a site's trainer is.

    Where this process cannot compute, the figures are from one that is not isolated, and the part
    fails.
    """
    found, why = _isolated(device, tiny)
    isolated = found is not None and found["refused"] is None
    yield "gpu_isolated", entry(float(isolated), "1: as a site's trainer, 0: not", None)
    if found is not None:
        yield from found["figures"]
        return
    yield from amplified_here(device.name, tiny=tiny)
    raise RuntimeError(f"{why}; the figures are from a process that is not isolated")


def _isolated(device: Device, tiny: bool) -> tuple[dict[str, Any] | None, str]:
    """What the isolated process found, and why it found nothing.

    In the first, `refused` says what the kernel refused to close; null: nothing.
    """
    program = str(Path(__file__).with_name("gpu.py"))
    command = [sys.executable, program, "--isolated", device.name, str(int(tiny))]
    seconds = ISOLATED_SECONDS * (10 if tiny else 1)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None, f"the isolated process did not end within {seconds:g} s"
    if done.returncode != 0:
        return None, f"the isolated process ended with {done.returncode}"
    return json.loads(done.stdout), ""


def amplified_here(device: str, *, tiny: bool) -> Figures:
    """The amplifying adapter, in this process: how far one record moves the sum, in clip norms."""
    place = Device(device)
    as_a_site(place)
    precisions = _precisions(place)
    for case in ("llama",) if tiny else ("llama", "bert"):
        for precision in precisions[:1] if tiny else precisions:
            with tempfile.TemporaryDirectory() as folder:
                found = measured(
                    Path(folder),
                    case,
                    cached=False,
                    precision=precision,
                    device=device,
                    count=6 if tiny else len(RECORDS),
                    proved_rows=2 if tiny else 64,
                )
            name = f"gpu_sensitivity_{case}_{precision}"
            yield name, _exact(found.after, "clip norms", 1 + CLIPPING)
            yield f"{name}_without_defence", _exact(found.before, "clip norms", None)


def steps(name: str, most: int, seconds: float) -> Callable[[Device, bool], Figures]:
    """The part that compares a private step with stock PEFT's, on a model of this shape.

    Args:
        most: the most records of a step.
        seconds: about how long both are measured.
    """

    def part(device: Device, tiny: bool) -> Figures:
        precision = _precisions(device)[-1]
        if precision != "bfloat16" and not tiny:
            raise NotHere("needs a device that computes bfloat16")
        shape = shape_of(name, tiny=tiny)
        is_bound = name == "7b" and not tiny
        yield from _compared(
            name,
            compare(
                shape,
                device,
                precision=precision,
                most=2 if tiny else most,
                turns=2 if tiny else 3,
                seconds=0.0 if tiny else seconds,
            ),
            shape.tokens,
            device,
            (STEP, MEMORY) if is_bound else (None, None),
        )

    return part


def _compared(
    name: str,
    found: Any,
    tokens: int,
    device: Device,
    targets: tuple[float | None, float | None],
) -> Figures:
    private, stock = found.private, found.stock
    ratio = private.seconds / stock.seconds
    yield f"gpu_dp_step_ratio_{name}", entry(ratio, "of PEFT's step", targets[0])
    if device.has_memory:
        peaks = [found.weights + one.own + one.rise for one in (private, stock)]
        above = [one.own + one.rise for one in (private, stock)]
        ratio = peaks[0] / peaks[1]
        yield f"gpu_dp_memory_ratio_{name}", entry(ratio, "of PEFT's peak", targets[1])
        yield (
            f"gpu_dp_memory_ratio_{name}_above_weights",
            entry(above[0] / above[1], "of PEFT's peak", None),
        )
        yield f"gpu_dp_peak_gb_{name}", entry(peaks[0] / 1e9, "GB", None)
    yield f"gpu_records_{name}", entry(found.records, f"records of {tokens} tokens a step", None)
    for kind, seconds in (("dp", private.seconds), ("peft", stock.seconds)):
        yield f"gpu_{kind}_step_s_{name}", entry(seconds, "s", None)
        yield (
            f"gpu_{kind}_tokens_per_s_{name}",
            entry(found.records * tokens / seconds, "tokens a second", None),
        )


def nf4(device: Device, tiny: bool) -> Figures:
    """A frozen model in four bits: its gradients, and its step beside PEFT's on the same layers."""
    # Where it is missing, this part does not run.
    importlib.import_module("bitsandbytes")
    if device.place.type == "pretend":
        raise NotHere("needs a device that bitsandbytes knows")
    shape = shape_of("small_llama", tiny=tiny)
    base = random_base(shape, device, torch.float32)
    quantise(base, torch.float32)
    model = adapted(shape, base, precision="float32")
    set_random(model)
    lengths = [9, 14, 24] if tiny else LENGTHS
    truth, together = alone_and_together(model, lengths)
    error = largest_error(together(), truth)
    yield "gpu_gradient_error_small_llama_nf4", _exact(error, "relative", GRADIENTS)
    if tiny:
        return
    precision = fastest_precision(device.place)
    shape = shape_of("1b", tiny=tiny)
    found = compare(shape, device, precision=precision, most=8, nf4=True, seconds=15.0)
    yield from _compared("1b_nf4", found, shape.tokens, device, (None, None))


def out_of_memory(device: Device, tiny: bool) -> Figures:
    """A step at a batch that cannot fit is done in smaller parts, with the same result."""
    if not device.has_memory:
        raise NotHere("needs a device with a memory of its own")
    shape = shape_of("wide", tiny=tiny)
    count = 8 if tiny else 16
    base = random_base(shape, device, torch.float32)
    model = adapted(shape, base, precision="float32")
    set_random(model)
    data = records(model, [shape.tokens] * count)
    start = model.vector()

    def stepped(limit: BatchLimit) -> np.ndarray:
        """What a step without noise changes."""
        model.set_vector(start)
        parameters = list(model.select(1).values())
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            StepNoise(os.urandom, parameters, steps=1),
            noise_multiplier=0.0,
            clip_norm=1.0,
            expected_batch_size=1.0,
        )
        task = task_of(model.plan.task)
        with per_record_gradients(model):
            private_step(task, model, data, np.arange(count), optimizer, limit)
        changed: np.ndarray = model.vector() - start
        return changed

    device.watch_peak()
    before = device.held()
    wanted = stepped(BatchLimit(count))
    needed = device.peak() - before
    device.free()
    limit = BatchLimit(count)
    with device.with_room(needed * 3 // 5):
        found = stepped(limit)
    if limit.records == count:
        raise RuntimeError(f"{count} records at once fitted into the memory that was left")
    yield "gpu_out_of_memory_records", entry(limit.records, f"records at once, of {count}", None)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    yield "gpu_out_of_memory_difference", _exact(error, "relative", RECOVERED)


def long_context(device: Device, tiny: bool) -> Figures:
    """One record of 8,192 tokens with gradient checkpointing, on the largest model that fits."""
    for name in ("7b", "1b"):
        shape = replace(shape_of(name, tiny=tiny), tokens=48 if tiny else 8192)
        found = _one_long_record(shape, device)
        device.free()
        if found is not None:
            seconds, peak = found
            yield f"gpu_dp_8k_tokens_{name}_step_s", entry(seconds, "s", None)
            if device.has_memory:
                yield f"gpu_dp_8k_tokens_{name}_peak_gb", entry(peak / 1e9, "GB", None)
            return
    raise NotHere("needs a device with more memory")


def _one_long_record(shape: Shape, device: Device) -> tuple[float, int] | None:
    """Seconds and peak bytes of a private step on one record; None where memory runs out."""
    precision = _precisions(device)[-1]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with ExitStack() as stack:
        try:
            base = random_base(shape, device, dtype)
            model = adapted(shape, base, precision=precision, checkpointing=True)
            kind = PrivateSteps(model, device, stack)
            kind.enter()
            kind.step(1)
            device.synchronize()
            device.watch_peak()
            began = time.perf_counter()
            kind.step(1)
            device.synchronize()
        except torch.OutOfMemoryError:
            return None
        return time.perf_counter() - began, device.peak()


def federation(device: Device, tiny: bool) -> Figures:
    """A simulated federation of two sites on the device, beside the same one on the CPU."""
    from umbel_simulations.backends.in_process import Federation
    from umbel_simulations.reporting.recorder import Recorder, ServerObserver, SiteObserver
    from umbel_simulations.reporting.results import Score
    from umbel_simulations.runs.setup import load_setup
    from umbel_simulations.scenario.scenario import Scenario

    if device.place.type == "pretend":
        raise NotHere("needs a device that client.toml can name")
    random = np.random.default_rng(4)
    words = [f"w{number}" for number in range(40)]
    adapters = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        model = save_bert(top / "model", words, hidden_size=64, intermediate_size=128)
        rows = [
            {"text": " ".join(random.choice(words, 12)), "label": "ab"[number % 2]}
            for number in range(88)
        ]
        for file, part in (("train.jsonl", rows[:80]), ("test.jsonl", rows[80:])):
            (top / file).write_text("".join(json.dumps(row) + "\n" for row in part))
        for kind in dict.fromkeys(("cpu", device.name)):
            scenario = msgspec.convert(_scenario(top, model, kind), Scenario)
            folder = top / kind.replace(":", "-")
            folder.mkdir()
            setup = load_setup(scenario)
            place = Federation(folder, scenario)
            place.set_up(setup.sites, setup.corpus.labels, setup.model)
            recorder = Recorder(folder / "metrics.jsonl", lambda _event: None)
            stop = threading.Event()
            observers = {site: SiteObserver(site, recorder, stop) for site in setup.sites}
            began = time.perf_counter()
            outcome = place.run(
                setup.plan,
                observers,
                ServerObserver(recorder, observers, lambda _adapter: Score()),
                workers=1,
                dropouts=(),
                stop=stop,
            )
            seconds = time.perf_counter() - began
            recorder.close()
            adapters[kind] = outcome.adapter
            if len(outcome.release.survivors) != 2:
                raise RuntimeError(f"only {outcome.release.survivors} took part")
    yield "gpu_federation_s", entry(seconds, "s", None)
    found, wanted = adapters[device.name], adapters["cpu"]
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    yield "gpu_federation_difference_to_cpu", _exact(error, "relative", FEDERATED)


def _scenario(folder: Path, model: Path, device: str) -> dict[str, Any]:
    """Two sites with forty records each, two rounds, and noise that both devices share."""
    return {
        "name": "gpu-check",
        "description": "two sites on one device",
        "seed": 7,
        "insecure_test_seed": 1,
        "model": {"name": "random", "path": str(model)},
        "data": {
            "source": "files",
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
        },
        "sites": {"count": 2, "partition": "iid", "minimum_records": 20},
        "task": {"task": "classification", "max_tokens": 24},
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["query", "value"], "method": "ffa"},
        "training": {
            "rounds": 2,
            "local_steps": 2,
            "expected_batch_size": 10,
            "adapter_learning_rate": 1e-3,
            "head_learning_rate": 1e-2,
            "optimizer": "sgd",
        },
        "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0},
        "aggregation": {"threshold": 2},
        "site_policy": {"minimum_cohort": 2},
        "compute": {"physical_batch_size": 4, "device": device},
    }


def _exact(value: float, unit: str, target: float | None) -> dict[str, Any]:
    """A figure that is too small, or too near to its bound, for the four digits of `entry`."""
    rounded = float(f"{value:.4g}") if value < 0.1 else round(value, 7)
    holds = None if target is None else math.isfinite(value) and value <= target
    return {"value": rounded, "unit": unit, "target": target, "holds": holds}


PARTS: dict[str, Callable[[Device, bool], Figures]] = {
    "gradients": gradients,
    "amplified": amplified,
    "7b": steps("7b", 8, 30.0),
    "1b": steps("1b", 8, 15.0),
    "bert_large": steps("bert_large", 32, 15.0),
    "nf4": nf4,
    "out_of_memory": out_of_memory,
    "8k_tokens": long_context,
    "federation": federation,
}
