"""What the programs that vLLM's own interpreter runs have in common."""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import traceback
import types
from pathlib import Path


class _Nothing(type):
    """Stands for any class, function or value of a package that is missing."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __call__(cls, *args, **options):
        return cls


class _Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] == "torchvision"
            else None
        )

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__version__ = [], "0"
        module.__getattr__ = lambda name: getattr(_Nothing("torchvision", (), {}), name)
        return module

    def exec_module(self, module):
        pass


def stand_in_for_torchvision():
    """Classes of wrappers import it at their top; text alone uses nothing of it."""
    import transformers.utils.import_utils  # noqa: F401  asks whether it is there, and is told the truth

    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Stand())


def build_models_in_this_process():
    """Where a class is looked at in a process of its own, no stand-in is there."""
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda function: function()


def rotate_by_torch():
    """The CPU kernel of 0.32 takes the step from head to head for that from token to token where a query has
    three dimensions, as MLA's has, and turns other numbers than it is given; vLLM's own torch code of the
    same layer does not."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def each_in_a_child(jobs, work):
    """Does ``work`` on each job in a forked child and prints its answer, a line each: vLLM is imported once,
    nothing of one model is left when the next is built, and what one breaks harms no other. What the child
    says goes to the file ``log`` of the job."""
    for job in jobs:
        answer = Path(job["log"]).with_suffix(".json")
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                answer.write_text(json.dumps(work(job)))
            except BaseException as error:  # the test shows it
                traceback.print_exc()
                answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            os._exit(0)
        os.waitpid(child, 0)
        found = json.loads(answer.read_text()) if answer.exists() else {"error": "vLLM died; see its log"}
        print("RESULT " + json.dumps({"name": job["name"], **found}), flush=True)
