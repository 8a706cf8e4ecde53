"""What a test may expect of this machine's processor."""

import pytest
import torch


def skip_without_avx512(unless: bool) -> None:
    """Ends a test whose attack needs the kernels that PyTorch has for AVX-512.

    With those for AVX2, PyTorch computes such a record in one way, whatever is beside it: there is
    nothing to attack, so nothing to show.

    Args:
        unless: whether the attack reaches its goal here all the same.
    """
    if not unless and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the attack without its check needs PyTorch's kernels for AVX-512")
