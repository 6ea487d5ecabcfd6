"""Every command that a recommendation prints runs: quantize takes it, and what comes of it can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant.catalog import catalogue
from quant.planning.recommendation import recommend
from tests.agreement import GPUS, architectures, disagreements, room_for_everything
from tests.stand_ins import published_config, with_fewer_experts, write_stand_in

#: Routed experts of a layer: as many as families group them by; more are more of the same.
EXPERTS = 16


#: One of each kind (none: Kimi-VL, whose stand-in is made from the planner's shapes); all of them, and
#: the whole catalogue: benchmarks/agreement.py.
SAMPLE = ("gpt2", "llama", "mistral3-mistral", "none", "qwen2_5_omni-qwen2_5_omni_thinker")


@pytest.mark.parametrize("architecture", SAMPLE)
def test_what_is_recommended_can_be_made_and_served(architecture: str, tmp_path: Path) -> None:
    name = architectures()[architecture][0]
    config = with_fewer_experts(published_config(catalogue()[name]["config"]), EXPERTS)
    source = write_stand_in(config, tmp_path / name.rpartition("/")[2])
    done: dict[str, Any] = {}
    whole = "caveat" not in catalogue()[name]
    with room_for_everything(seconds=0):
        problems = [
            problem
            for gpu in GPUS
            for problem in disagreements(recommend(config, gpu), gpu, source, tmp_path / "made", done, whole)
        ]
    assert not problems, "\n".join(problems)
