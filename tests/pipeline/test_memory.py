"""What keeps a job's memory in bounds."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux only")
def test_a_job_begins_large_tensors_at_pages_and_no_child_inherits_that() -> None:
    program = (
        "import os, mmap, sys, quant.pipeline.memory\n"
        "from quant import errors, jobs\n"
        "assert 'torch' not in sys.modules\n"
        "try: jobs.plan(quant.make_recipe({'model_path': 'none', 'output_path': 'o', 'method': 'minmax'}))\n"
        "except errors.QuantError: pass\n"
        "import torch\n"
        "tensors = [torch.empty(1 << 20) for _ in range(20)]\n"
        "print({t.data_ptr() % mmap.PAGESIZE for t in tensors}, 'THP_MEM_ALLOC_ENABLE' in os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{0} False"


@pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux only")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
)
def test_waiting_threads_give_up_their_core_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str
) -> None:
    program = (
        "import os\n"
        "from quant.pipeline.memory import prepare_torch\n"
        "prepare_torch(); print(os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | given,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.stdout.strip() == str(given.get("GOMP_SPINCOUNT"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """Also that between blocks that are still in use."""
    program = (
        "import quant\n"
        "from quant.pipeline.memory import freed_memory_kept, give_back\n"
        "import torch\n"
        "def resident(): return next(int(l.split()[1]) >> 10 for l in open('/proc/self/status') if "
        "l.startswith('VmRSS'))\n"
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
