"""What keeps a job's memory in bounds."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux only")
def test_a_job_begins_large_tensors_at_pages_and_no_child_inherits_that() -> None:
    program = (
        "import os, mmap, quant\n"
        "quant.QuantizationManager\n"
        "import torch\n"
        "tensors = [torch.empty(1 << 20) for _ in range(20)]\n"
        "print({t.data_ptr() % mmap.PAGESIZE for t in tensors}, 'THP_MEM_ALLOC_ENABLE' in os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{0} False"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """Also that between blocks that are still in use."""
    program = (
        "import quant\n"
        "from quant.pipeline.memory import freed_memory_kept, give_back\n"
        "import torch\n"
        "def resident(): return next(int(l.split()[1]) >> 10 for l in open('/proc/self/status') if l.startswith('VmRSS'))\n"
        "with freed_memory_kept():\n"
        "    before = resident()\n"
        "    tensors = [torch.zeros(1 << 20) for _ in range(100)]\n"
        "    del tensors[::2]\n"
        "    kept = resident() - before\n"
        "    give_back()\n"
        "    print(kept, resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, left = (int(value) for value in done.stdout.split())  # MiB, of 400 that were taken
    assert kept > 380 and 180 < left < 220
