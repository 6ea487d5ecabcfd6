"""What keeps a job's memory in bounds."""

from __future__ import annotations

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
