"""What keeps a job's memory in bounds."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_a_job_lays_tensors_out_by_pages_and_no_child_inherits_that() -> None:
    program = (
        "import os, mmap, quant\n"
        "quant.QuantizationManager\n"
        "import torch\n"
        "print({torch.empty(5000).data_ptr() % mmap.PAGESIZE for _ in range(20)}, 'THP_MEM_ALLOC_ENABLE' in os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{0} False"
