"""What is known of a serving engine, and whether it reads a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.data import load_json
from quant.hardware import UNNAMED, Gpu
from quant.schemes import Scheme
from quant.vllm.config import model_types

#: Group sizes of Marlin's kernels of packed integers, which SGLang and TGI run for them. That vLLM takes the
#: same on every kernel of its own (:data:`quant.vllm.kernels.GROUP_SIZES`) is a fact of its release, not of
#: theirs.
MARLIN_GROUPS = (-1, 32, 64, 128)
#: The format of a checkpoint that is not quantized.
UNQUANTIZED = "none"
_PLATFORMS = {"cuda": "NVIDIA's GPUs", "rocm": "AMD's GPUs", "cpu": "a CPU"}


@dataclass(frozen=True)
class Reading:
    """One row of what an engine computes with.

    Attributes:
        format: how the file stores it, by its name in :data:`quant.formats.FormatRegistry`;
            :data:`UNQUANTIZED` for one that is not quantized.
        schemes: by the names of :data:`quant.schemes.SCHEMES`; of an unquantized one, its dtypes.
        least: lowest compute capability; None: it is not known here.
        end: first compute capability whose kernels are missing again.
        platforms: kinds of hardware (:attr:`quant.hardware.Gpu.platform`); AMD's must compute in FP8 for FP8.
        groups: group sizes that the kernels take; None: any.
        experts: whether routed experts have a kernel too.
        tried: last generation, by the first number of its compute capability, that the source names; of
            newer ones it is not known. None: all.
    """

    format: str
    schemes: tuple[str, ...]
    least: tuple[int, int] | None
    end: tuple[int, int] | None = None
    platforms: tuple[str, ...] = ("cuda",)
    groups: tuple[int, ...] | None = None
    experts: bool = True
    tried: int | None = None

    def __str__(self) -> str:
        if self.format == UNQUANTIZED:
            return "unquantized weights"
        return f"{self.format} with {', '.join(self.schemes)}"


@dataclass(frozen=True)
class Flag:
    """An engine's word for an argument of vLLM's.

    Attributes:
        name: without dashes; empty: the engine has none, and ``instead`` says what to do.
        aliases: other names of it, with dashes in them.
        values: vLLM's values that it calls otherwise; None leaves the flag out, which means the same.
        note: how it differs; it is added to the reason.
        instead: the next step of a user who asked for it.
    """

    name: str = ""
    values: Mapping[str, str | None] = field(default_factory=dict)
    note: str = ""
    instead: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageUser:
    """The user that a container image is prepared for, other than root.

    Attributes:
        home: its folder, which group 0 can write to.
        platforms: kinds of hardware whose image is.
    """

    uid: int
    gid: int
    home: str
    platforms: tuple[str, ...] = ("cuda",)


#: A command inside an image with Python that fails where ``{url}`` does not answer.
PYTHON_PROBE = ("python3", "-c", "import urllib.request; urllib.request.urlopen('{url}', timeout=5)")


@dataclass(frozen=True)
class Engine:
    """A serving engine.

    Attributes:
        name: what ``--engine`` is given.
        title: as its project writes it.
        release: that the facts are of.
        program: words of its command before the model.
        images: container images, by kind of hardware; AMD's by ``rocm`` or by architecture; ``{release}``
            stands for the release.
        enters: whether the image's entry point is the program's first word, or all words where
            ``program`` has a subcommand, so that a container is given the rest alone.
        flags: its words, by vLLM's names of arguments; None: vLLM's own.
        always: flags that it always gets, with the reason.
        says_one_rank: whether it must be told that it runs on one GPU alone.
        model_aliases: other names, without dashes before them, of the flag that ``program`` ends with.
        key_variable: environment variable of the API key; empty: the key is the flag ``api-key``, or,
            without ``takes_key``, it checks none.
        health: path that answers 200 once it serves.
        diagnosed: whether the causes in its log are known (:mod:`quant.serving.failures`).
        model_name: whether it can be told the name that clients call the model.
        environment: variables that keep it from asking or telling anybody.
        reads: what it computes with; none where ``otherwise`` says it in words.
        about: what more is known of that.
        files: whether it reads a single file, not a folder of safetensors.
        strict: whether it serves no model that it has no class of its own for.
        drain: flag, without dashes, of the seconds that requests under way get to end in once it is told to
            stop; empty: it lets them end by itself.
        probe: command inside its image that fails while ``{url}`` does not answer.
        user: that the image is prepared for; None: root.
        container: what its container is called in a pod.
        cache_variable: environment variable of the GiB of a CPU's memory that the cache takes; empty: none.
        exports: what to do with a checkpoint that it does not read.
        kinds: artefacts that can be written for it; None: all of vLLM's.
        by_variables: whether its words are environment variables, and a model is made known to it by a
            Modelfile once it runs.
    """

    name: str
    title: str
    release: str
    program: tuple[str, ...]
    images: Mapping[str, str]
    reads: tuple[Reading, ...] = ()
    enters: bool = True
    flags: Mapping[str, Flag] | None = None
    always: tuple[tuple[str, str | bool, str], ...] = ()
    says_one_rank: bool = False
    model_aliases: tuple[str, ...] = ()
    key_variable: str = ""
    takes_key: bool = True
    health: str = "/health"
    diagnosed: bool = False
    model_name: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    exports: str = ""
    otherwise: str = ""
    about: str = ""
    files: bool = False
    strict: bool = False
    drain: str = ""
    probe: tuple[str, ...] = PYTHON_PROBE
    user: ImageUser | None = None
    container: str = "server"
    cache_variable: str = ""
    kinds: tuple[str, ...] | None = ("shell", "compose", "systemd", "kubernetes")
    by_variables: bool = False

    @property
    def entry(self) -> tuple[str, ...]:
        """Words that a container is given before the model."""
        if not self.enters:
            return self.program
        # an option that names the model is none of the entry point's words
        return tuple(word for word in self.program if word.startswith("-"))

    def word(self, name: str) -> str:
        """Its name of an argument of vLLM's; empty: it has none."""
        if self.flags is None:
            return name
        return self.flags[name].name if name in self.flags else ""

    def names(self, word: str) -> tuple[str, ...]:
        """Every name of one of its flags, with dashes in them, as :func:`quant.serving.passed_on.flag_of`
        has them; none of an empty one."""
        flags = [f for f in (self.flags or {}).values() if f.name == word]
        return (word.replace("_", "-"), *(a for f in flags for a in f.aliases)) if word else ()

    def image(self, gpu: Gpu | None) -> str | None:
        """The container image for a GPU; None: the project publishes none for its kind."""
        platform = gpu.platform if gpu is not None else "cuda"
        own = gpu.architecture if gpu is not None else ""
        return self.published.get(own) or self.published.get(platform)

    @property
    def published(self) -> dict[str, str]:
        """The images of its release, by kind of hardware or architecture."""
        return {kind: image.format(release=self.release) for kind, image in self.images.items()}

    def serves(self, config: Mapping[str, Any]) -> bool | None:
        """Whether it has a class of its own for a model, by its config.json; None: it is not known here,
        because its own converter or loader decides, or because the class is known of a later release."""
        known = load_json("engines.json").get(self.name)
        if known is None:
            return None
        if "model_types" in known:
            return bool(set(known["model_types"]) & set(model_types(config)))
        named = config.get("architectures")
        stated = named if isinstance(named, list) else []
        names = {x for x in stated if isinstance(x, str)}
        return (
            True
            if names & set(known["architectures"])
            else None
            if names & set(known.get("later", ()))
            else False
        )


@dataclass(frozen=True)
class Misfit:
    """Why an engine does not compute with something, and the next step."""

    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.why}: {self.instead}"


def reading_problem(
    engine: Engine, format: str, schemes: Iterable[tuple[Scheme, bool]], gpu: Gpu | None
) -> tuple[Misfit | None, list[str]]:
    """Whether an engine computes with what a checkpoint holds.

    Args:
        format: its format; :data:`UNQUANTIZED`, with no schemes, where it is not quantized.
        schemes: of its linears, each with whether it is that of routed experts.
        gpu: that it is to run on; None: whichever.

    Returns:
        why it does not, or None; and what is not known of it.
    """
    unknown: list[str] = []
    parts: list[tuple[str, Scheme | None, bool]] = [(s.name, s, experts) for s, experts in schemes]
    parts = parts or [(UNQUANTIZED, None, False)]
    for name, scheme, experts in parts:
        rows = [r for r in engine.reads if r.format == format and (scheme is None or name in r.schemes)]
        if not rows:
            known = "; ".join(map(str, engine.reads)) or engine.otherwise
            held = f"{name} in the {format} layout" if scheme is not None else f"{format} weights"
            does = f"it reads {known}. What would do: {engine.exports}"
            return Misfit(f"{engine.title} {engine.release} reads no {held}", does), unknown
        row = rows[0]
        if experts and not row.experts:
            why = f"{engine.title} {engine.release} has no kernel for routed experts in {name}"
            return Misfit(why, "take another scheme, or plan it with --engine vllm"), unknown
        size = scheme.weights.group_size if scheme is not None else None
        if row.groups is not None and scheme is not None and size not in row.groups:
            groups = ", ".join(map(str, row.groups))
            why = f"{engine.title} {engine.release} takes {name} in groups of {groups}, not {size}"
            return Misfit(why, "quantize with another --group-size"), unknown
        what = "unquantized weights" if scheme is None else name
        if problem := _hardware_problem(engine, row, what, gpu):
            return problem, unknown
        if gpu is None or gpu.platform != "cuda" or gpu.capability is None:
            continue
        generation, _ = gpu.capability
        if row.tried is not None and generation > row.tried:
            unknown.append(f"whether {engine.title} serves {what} on {gpu.name} is not known here")
        if row.least is None:
            unknown.append(f"from which compute capability on {engine.title} serves {what} is not known here")
    return None, list(dict.fromkeys(unknown))


def _hardware_problem(engine: Engine, row: Reading, name: str, gpu: Gpu | None) -> Misfit | None:
    from quant.vllm.kernels import formats_of

    if gpu is None or gpu.kind == UNNAMED:
        return None
    if gpu.platform not in row.platforms:
        known = " and ".join(_PLATFORMS[p] for p in row.platforms)
        on = f"on {known}, not on {_PLATFORMS[gpu.platform]} ({gpu.name})"
        why = f"{engine.title} {engine.release} is known here to serve {name} {on}"
        return Misfit(why, "--engine vllm plans for those")
    if gpu.platform == "rocm" and "fp8" in name and formats_of(gpu)["fp8"] != "native":
        why = f"{gpu.name} ({gpu.architecture}) does not compute in FP8, which {name} takes"
        return Misfit(why, "take another scheme")
    if gpu.platform != "cuda" or gpu.capability is None:
        return None
    level = ".".join(map(str, gpu.capability))
    until = f" and below {row.end[0]}.{row.end[1]}" if row.end else ""
    if row.least is not None and gpu.capability < row.least or row.end and gpu.capability >= row.end:
        least = ".".join(map(str, row.least or (0, 0)))
        serves = f"{engine.title} {engine.release} serves {name} from compute capability {least} on{until}"
        instead = "take another GPU or scheme, or plan it with --engine vllm"
        return Misfit(f"--gpu is {gpu.name} ({level}), and {serves}", instead)
    return None
