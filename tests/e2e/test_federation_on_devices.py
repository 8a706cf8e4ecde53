"""A whole simulated federation whose sites are dealt over two pretended devices."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support import pretended

from umbel_client.models.base.precision import fastest_precision
from umbel_client.site.config import load_config
from umbel_common.canonical import decode_canonical
from umbel_common.device import require_device
from umbel_common.plans.plan import PLAN_VERSIONS
from umbel_common.trust.identity import Signed
from umbel_host.files.adapter_folder import read_vector
from umbel_simulations.runs.run import run_scenario
from umbel_simulations.scenario.file import find_scenario

torch.set_num_threads(1)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_sites_on_two_devices_release_the_adapter_of_sites_on_the_cpu(
    tmp_path: Path,
    replace_everywhere: Callable[[object, object], None],
) -> None:
    replace_everywhere(require_device, lambda device, **_: None)
    # A CPU may be faster in bfloat16, which the pretended device does not offer.
    replace_everywhere(fastest_precision, lambda device: "float32")
    scenario = msgspec.structs.replace(find_scenario("smoke"), insecure_test_seed=1)
    released = []
    for name, device in (("cpu", "cpu"), ("both", pretended.DEVICES)):
        compute = msgspec.structs.replace(scenario.compute, device=device)
        folder = tmp_path / name
        run_scenario(msgspec.structs.replace(scenario, compute=compute), folder, lambda _: None)
        signed = decode_canonical((folder / "plan.msgpack").read_bytes(), Signed)
        plan = decode_canonical(signed.statement, PLAN_VERSIONS)
        released.append(read_vector(folder / "adapter", plan))
        chosen = {
            load_config(site / "client.toml").model.device for site in (folder / "sites").iterdir()
        }
        assert chosen == ({device} if isinstance(device, str) else set(device))
    assert np.linalg.norm(released[1] - released[0]) < 1e-2 * np.linalg.norm(released[0])
