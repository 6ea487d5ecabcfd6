"""The one loop over blocks, and everything known before it starts."""

from quant.pipeline.memory import prepare_torch

prepare_torch()  # nothing outside this package has needed torch yet, when a job is what it is needed for
