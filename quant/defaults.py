"""Defaults of a job, written once: the recipe, the command line's help and the docs read them here."""

SAMPLES = 128
SEQUENCE_LENGTH = 2048
SEED = 0
EVALUATION_CHUNKS = 100
EVALUATION_LENGTH = 512
