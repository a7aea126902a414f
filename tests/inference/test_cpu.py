import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from speechbrain_mrl.inference.optimize import prepare_cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
prepare_cpu()
faults()
print(before, faults(), torch.tensor([1e-40]).mul(1.0).item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's allocator is glibc's")
def test_freed_memory_is_used_again_and_subnormal_numbers_are_flushed():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, subnormal = map(float, done.stdout.split())
    assert before > 10 * max(after, 1)  # with pages of 4 KB, 16,384 a tensor against none
    assert subnormal == 0
