"""What loading a base model needs: `python tests/benchmarks/bench_load.py` prints JSON.

The model is a random Llama of 851 million numbers, stored in bfloat16 (1.7 GB), once in several
files and once in one. Each figure is from a fresh process, which loads the model with an adapter
on its last layer, or merges that adapter into it.

Memory: by how far the peak of the resident set (VmHWM, pages of files included) rises above what
the process has with its libraries imported (VmRSS), divided by the bytes of the model as the
process holds or writes it. Seconds: processor time for 10^9 bytes that are read; libraries that
are imported late are included.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from bench_masking import entry
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.small_models import plan_for, save_decoder

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.folder import read_adapter, write_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_client.models.base.int8 import scale_of
from umbel_client.models.base.skeleton import quietly, skeleton
from umbel_common.adapters.vector import initial_vector
from umbel_common.plans.plan import CausalLm

LAYERS = 14
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TARGET = 1.15
Kind = Literal["float32", "bfloat16", "int8", "nf4", "merge"]
FIGURES: dict[str, tuple[int, Kind, float | None]] = {
    "load_host_peak_ratio": (4, "bfloat16", TARGET),
    "load_host_peak_ratio_one_shard": (1, "bfloat16", TARGET),
    "load_host_peak_ratio_float32": (4, "float32", TARGET),
    "load_host_peak_ratio_int8": (4, "int8", TARGET),
    "load_host_peak_ratio_nf4": (4, "nf4", None),
    "merge_host_peak_ratio": (4, "merge", TARGET),
}
"""Number of files, what the process does, and the target."""


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {shards: saved(Path(name) / str(shards), shards) for shards in (4, 1)}
        for figure, (shards, kind, target) in FIGURES.items():
            # What is freed goes back to the system at once: the resident set is what is in use.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
            command = [sys.executable, __file__, str(folders[shards]), kind]
            done = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            peak, held, seconds = json.loads(done.stdout.splitlines()[-1])
            figures[figure] = entry(peak / held, "of the model's bytes", target)
            if kind != "merge":
                read = sum(file.stat().st_size for file in folders[shards].glob("*.safetensors"))
                part = figure.removeprefix("load_host_peak_ratio")
                figures[f"load_s_per_gb{part}"] = entry(seconds / read * 1e9, "s of CPU", None)
    return figures


def saved(folder: Path, shards: int) -> Path:
    """Writes a model in this number of files, and an adapter for it; returns its folder."""
    write_random(folder, SIZES, shards)
    plan = plan_for(folder, CausalLm(), {"rank": 8, "layers": (LAYERS - 1,)})
    write_adapter(folder / "adapter", plan, initial_vector(plan), None, base_model=folder)
    return folder


def write_random(folder: Path, sizes: dict[str, Any], shards: int) -> None:
    """Writes a Llama of these sizes in bfloat16, with random weights, in this number of files."""
    with quietly():
        save_decoder(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    shapes = {
        name: empty.shape for name, empty in skeleton(folder, CausalLm()).state_dict().items()
    }
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard}.safetensors"
        names = list(shapes)[shard::shards]
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for tensor in tensors.values():
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)


def load(folder: Path, kind: Kind) -> tuple[int, int, float]:
    """What a process of `measure` does: bytes at the peak, bytes of the model, and seconds."""
    torch.set_num_threads(1)
    plan, _ = read_adapter(folder / "adapter")
    before, start = _status("VmRSS"), time.process_time()
    if kind == "merge":
        out = folder / "merged"
        merge_adapter(folder / "adapter", folder, out, dtype="bfloat16")
        held = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        return _status("VmHWM") - before, held, time.process_time() - start
    model = AdaptedModel.load(
        folder,
        plan,
        precision="bfloat16" if kind == "bfloat16" else "float32",
        quantisation=kind if kind in ("int8", "nf4") else "none",
    )
    seconds = time.process_time() - start
    return _status("VmHWM") - before, held_bytes(model), seconds


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, with those of what its quantised weights need."""
    parts = [*model.parameters(), *model.buffers()]
    states = [state for part in parts if (state := getattr(part, "quant_state", None)) is not None]
    parts += [part for state in states for part in (state.absmax, state.state2.absmax)]
    parts += [scale for part in parts if (scale := scale_of(part)) is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given: Any = sys.argv[2]
        print(json.dumps(load(Path(sys.argv[1]), given)))
    else:
        print(json.dumps(measure(), indent=2))
