"""Models by Hub id: the local cache first, then a download where one is allowed."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quant.documents import read_document
from quant.errors import CheckpointError, UsageError, clipped
from quant.remote import is_remote, mirrored, url_of

#: The file that says of a folder of the cache which GGUF file it stands for (:mod:`quant.gguf.reading`).
GGUF_MARK = ".quant-gguf.json"
#: ``org/name``, and ``org/name@revision``, as the Hub allows them.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ID = re.compile(rf"(?P<repo>{REPOSITORY.pattern})(?:@(?P<revision>[\w./-]+))?")
#: Files of a repository that no command reads: weights in other containers, and other frameworks' copies.
_NOT_READ = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "original/*"]


def is_hub_id(text: str) -> bool:
    """Whether a model is named by Hub id: it looks like one, and nothing on the disk has that name.

    >>> is_hub_id("Qwen/Qwen3-8B@main"), is_hub_id("models"), is_hub_id("/a/b"), is_hub_id("./a")
    (True, False, False, False)
    """
    return _HUB_ID.fullmatch(text) is not None and not Path(text).exists()


def parse_hub_id(text: str, what: str) -> tuple[str, str | None]:
    """Repository and revision of ``org/name[@revision]``.

    >>> parse_hub_id("org/name@w4a16", "--push-to-hub")
    ('org/name', 'w4a16')

    Raises:
        UsageError: it is none; ``what`` begins the message.
    """
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise UsageError(f"{what} is {clipped(text)}: ORG/NAME is needed, or ORG/NAME@BRANCH")
    repo, revision = match["repo"], match["revision"]
    if revision is not None and ".." in revision:
        raise UsageError(f"{text}: {revision!r} is no revision: give a branch, a tag or a commit")
    return repo, revision


#: Whether the network is forbidden by this program, for transformers, and not by the user.
_forbidden_here = False


def forbid_network() -> None:
    """Makes the Hub's client, and with it transformers, work from local files alone, but within
    :func:`online`. What the user forbids stays forbidden there too."""
    global _forbidden_here
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _forbidden_here = True
        constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # child processes


def set_offline() -> bool:
    """Whether the user forbids the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) and not _forbidden_here


@contextmanager
def online() -> Iterator[None]:
    """Lifts what :func:`forbid_network` set, for a download or an upload that the user asks for."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = set_offline()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def repository_of(path: Path) -> str | None:
    """The Hub id of a directory inside the Hub's cache; None of any other.

    >>> repository_of(Path("/c/models--org--name/snapshots/0f"))
    'org/name'
    """
    for part in path.absolute().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def model_name(path: Path) -> str:
    """What to call a model directory: its own name, or the repository's where the Hub's cache names it by
    commit."""
    repository = repository_of(path)
    return path.resolve().name if repository is None else repository.partition("/")[2]


def cached_snapshot(text: str) -> Path | None:
    """The snapshot of a Hub id in the local cache, whatever of it is there; None where nothing is.

    Read without the Hub's client, which takes longer to import than a plan to make.
    """
    from huggingface_hub import constants

    repo, revision = parse_hub_id(text, "the model")
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision or ""
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-f]{7,64}", commit) and snapshot.is_dir() else None


def config_of(model: str | Path) -> Path:
    """The directory of a model's config.json, fetched where a Hub id's is not in the cache; of a path itself.

    Raises:
        CheckpointError, UsageError: as :func:`fetched_config`.
    """
    if not is_hub_id(str(model)):
        return Path(model)
    snapshot = cached_snapshot(str(model))
    there = snapshot is not None and (snapshot / "config.json").is_file()
    return snapshot if snapshot is not None and there else fetched_config(str(model))


def fetched_config(text: str) -> Path:
    """The snapshot of a Hub id in the cache, once its config.json was fetched: nothing else is.

    Raises:
        CheckpointError: HF_HUB_OFFLINE forbids it; or no such model, no access, no config.json, no network.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    repo, revision = parse_hub_id(text, "the model")
    if set_offline():
        raise CheckpointError(
            f"{text}: its config.json is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
            "forbids fetching it: unset that, or leave --online out for a plan by the catalogue"
        )
    try:
        with online():
            # asked for once, before the download that tries again for half a minute where no network is
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json", revision=revision))
            return Path(hub.hf_hub_download(repo, "config.json", revision=revision)).parent
    except Exception as error:  # what a network does is of many kinds
        raise _refused(text, revision, "its config.json is not in the cache", error) from error


def named(path: str | Path) -> str:
    """How a command names a model directory: by Hub id where it is what the cache has of main, else by its
    path."""
    folder = Path(path).absolute()
    if (url := url_of(folder)) is not None:
        return url
    try:  # what stands for a GGUF file
        return str(read_document(folder / GGUF_MARK)["file"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    repository = repository_of(folder)
    try:
        newest = (folder.parent.parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return str(path)
    return repository if repository is not None and folder.name == newest else str(path)


def local_model(model: str | Path, download: bool = True) -> Path:
    """The directory of a model that is named by path or Hub id.

    Args:
        model: a path, ``org/name[@revision]``, the same behind ``hf://``, or an address of storage
            (:mod:`quant.remote`). What is there as a path is one.
        download: whether what the cache lacks may be fetched; HF_HUB_OFFLINE forbids it as well.

    Returns:
        the path as it is, or the snapshot in the cache.

    Raises:
        UsageError: a revision that is not one.
        CheckpointError: not in the cache and not to be fetched, also because its first part is a directory
            here, so that a path is meant; or no such model, no access, no network.
    """
    text = str(model).removeprefix("hf://")
    if is_remote(text):
        return mirrored(text)
    if not is_hub_id(text):
        return Path(text)
    repo, revision = parse_hub_id(text, "the model")
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    cached: Path | None
    try:
        cached = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.HFValidationError as error:
        raise UsageError(f"{text}: no Hub id: {error_line(error)}") from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        cached = None
    if cached is not None and is_whole(cached):
        return cached
    if cached is None and Path(repo).parent.is_dir():
        raise CheckpointError(
            f"{text}: there is no such directory in {Path(repo).parent.resolve()}; of a Hub model by that "
            f"name the cache has nothing: hf download {repo} puts it there"
        )
    where = (
        f"there is no such directory, and {'only a part of it is' if cached else 'it is not'} in the cache"
    )
    if not download:
        if cached is not None and (cached / "config.json").exists():
            return cached
        raise CheckpointError(
            f"{text}: {where} {constants.HF_HUB_CACHE}; plans fetch nothing without --online: "
            f"hf download {repo}, or that for a plan by its config.json, or --model {repo} for one by name"
        )
    if set_offline():
        raise CheckpointError(
            f"{text}: {where} {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids fetching it: unset "
            f"that, or fetch it elsewhere with hf download {repo}"
        )
    try:
        with online():
            return Path(hub.snapshot_download(repo, revision=revision, ignore_patterns=_NOT_READ))
    except Exception as error:  # what a network does is of many kinds
        raise _refused(text, revision, where, error) from error


def _refused(text: str, revision: str | None, where: str, error: Exception) -> CheckpointError:
    """What to say of a failed request to the Hub: whether it is the model, the access, or the network.

    Args:
        where: what is not where.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        said = "its owners give access on request: ask for it on the model's page, then hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"the model has no revision {revision!r}: leave it out for the newest"
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = (
            "there is no such directory, and no such model on the Hub that you may see: check the spelling; "
            "for a private one, hf auth login"
        )
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        said = "the model has no config.json, by which plans are made: give one that has, or its directory"
    else:
        said = (
            f"{where} {constants.HF_HUB_CACHE}, and fetching it failed ({error_line(error)}): check the "
            "network, then run the same command again: what was fetched is kept"
        )
    return CheckpointError(f"{text}: {said}")


def error_line(error: BaseException) -> str:
    """What an error of the Hub's client says, on one line."""
    words: list[Any] = " ".join(str(error).split()).split(". ")
    return f"{type(error).__name__}: {textwrap.shorten(str(words[0]), 160, placeholder=' …')}"


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has the config and all weight files that its index names."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    try:
        names = read_document(index)["weight_map"].values()
        return all((folder / str(name)).exists() for name in set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # the reader says what is wrong with it
