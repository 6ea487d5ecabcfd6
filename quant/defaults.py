"""Defaults of a job, written once and free of torch: the recipe, the methods, the engines and the command
line's help read them here."""

from dataclasses import dataclass
from typing import Literal

SAMPLES = 128
SEQUENCE_LENGTH = 2048
#: yaqa: rows that gradients are taken through, at the most
GRADIENT_SAMPLES = 64
SEED = 0
#: ``search``: blocks that candidates are made of; rows that they are made by, and tokens of each at the most;
#: tokens that they are measured on
SEARCH_BLOCKS = 4
SEARCH_SAMPLES = 32
SEARCH_LENGTH = 512
SEARCH_JUDGED = 4096
#: ``distill``: rows that are taught
LESSON_SAMPLES = 256
EVALUATION_CHUNKS = 100
EVALUATION_LENGTH = 512
#: of each text that ``evaluate --domains`` measures on
DOMAIN_CHUNKS = 16
#: ``evaluate --long-context``: tokens a chunk, chunks, and the position beyond which a context is long
LONG_LENGTH = 8192
LONG_CHUNKS = 8
LONG_POSITION = 4096

#: The engine of this package; of each legacy engine, the only method that it has and the format it writes.
ENGINE: Literal["native"] = "native"
LEGACY_ENGINES = {"auto-gptq": ("gptq", "gptq"), "autoawq": ("awq", "awq")}

FORMAT = "compressed-tensors"
#: ``prune``: by what the importance of a block is measured
IMPORTANCES = ("kl", "angle")
#: which tokens the experts of a mixture are calibrated with
MOE_CALIBRATION: Literal["routed", "all", "blend"] = "blend"
#: gptq
DAMPING = 0.01
ACT_ORDER: Literal["none", "static"] = "static"
#: by method; others have none
CLIP_SEARCH = {"gptq": True, "yaqa": True, "awq": True, "minmax": False}
#: the outlier suppressor that is part of a method
SUPPRESSORS = {"awq": "awq"}
#: smooth_quant
ALPHA = 0.5

#: What decides among the schemes that fit → its bound of speed (None: none, the most precise one is taken)
#: and the expected loss in percent that it may cost.
OBJECTIVES: dict[str, tuple[str | None, float]] = {
    "balanced": ("served_bound", 1.0),
    "quality": (None, 100.0),
    "throughput": ("served_bound", 4.0),
    "latency": ("decode_bound", 4.0),
}

#: Where a server listens; seconds to wait for its /health: large models load for minutes, and compiling and
#: graph capture come on top.
HOST = "127.0.0.1"
PORT = 8000
START_TIMEOUT = 1800.0


#: How much a job that names no method spends → what that means.
EFFORTS = {
    "fast": "gptq for 4 bits, rounding to nearest for 8",
    "balanced": "the same with yaqa instead of gptq, where gradients go through a model without experts",
    "best": "yaqa for experts, too, with gradients of all --samples, of four times as many outputs together, "
    "refined twice, with negative scales; and zero points for inputs of 8-bit integers",
}
EFFORT = "balanced"
#: Options of yaqa that ``best`` brings.
BEST = {"outputs": 1024, "rounds": 2, "signed": True, "sweeps": 2}


@dataclass(frozen=True)
class MethodRow:
    """What a list says of a rounding method, whose code needs torch.

    Attributes:
        calibration: whether it reads calibration text.
        source: the paper, or empty.
        rounds: whether what it makes has fewer bits; else it stays in the model's own dtype.
    """

    about: str
    calibration: bool
    source: str = ""
    rounds: bool = True


#: Values of ``--method``.
METHODS = {
    "awq": MethodRow(
        "scales salient inputs, then rounds to nearest with searched ranges", True, "2306.00978"
    ),
    "fp8": MethodRow("minmax with an FP8 scheme", False),
    "gptq": MethodRow("rounds column by column, later columns take up the error", True, "2210.17323"),
    "hqq": MethodRow("fits zero points to a heavy-tailed error, no data", False, "Badri and Shaji 2023"),
    "magnitude": MethodRow("prunes the smallest weights", False, rounds=False),
    "minmax": MethodRow("rounds to nearest between the extremes", False),
    "none": MethodRow("leaves weights as they are: smoothing alone", True, rounds=False),
    "sparsegpt": MethodRow(
        "prunes the weights that others can stand in for, and fits those", True, "2301.00774", rounds=False
    ),
    "wanda": MethodRow(
        "prunes the weights that are smallest beside their inputs", True, "2306.11695", rounds=False
    ),
    "yaqa": MethodRow(
        "gptq that feeds errors back along outputs too, by gradients of the whole model", True, "2505.22988"
    ),
}
#: Those among them that leave weights in the model's own dtype, and so are written as plain checkpoints.
UNROUNDED = frozenset(name for name, row in METHODS.items() if not row.rounds)
