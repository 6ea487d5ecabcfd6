"""Outputs on the Hugging Face Hub: what stands against an upload is said before the hours of work, and the
finished folder arrives in one commit, so that nobody ever fetches half a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.checkpoint.reader import open_checkpoint
from quant.errors import QuantError, UsageError
from quant.evaluation.verify import verify
from quant.hub import error_line, online, parse_hub_id, repository_of, set_offline
from quant.progress import Event, Progress, silent
from quant.recipe import Recipe
from quant.report.card import CARD, card, source_card
from quant.report.files import load_evaluation, measured_kl
from quant.report.page import PAGE, page
from quant.report.value import REPORT, Report
from quant.units import format_size
from quant.vllm.arguments import engine_arguments, vllm_config

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

#: Files by which a repository holds a model already.
_MODEL = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", "config.json")
#: What git itself keeps in a repository: never uploaded from an output, never deleted.
_GIT = (".gitattributes", ".gitignore", ".git/")
_TOKENS = "huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Destination:
    """Where on the Hub an output goes.

    Attributes:
        repo: ``org/name``; made where there is none.
        revision: branch, made where there is none; None: main.
        private: whether a new repository is private; one that is there must be.
        message: of the commit; None: one that says what was uploaded.
        replace: whether a model that is there makes room: files that the output does not have are deleted in
            the same commit.
    """

    repo: str
    revision: str | None = None
    private: bool = False
    message: str | None = None
    replace: bool = False

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Uploaded:
    """What an upload made: ``url`` of the repository, ``commit``, and ``bytes`` of the files that are there;
    ``changed`` is false where it held them all already."""

    repository: str
    revision: str
    url: str
    commit: str
    bytes: int
    changed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def destination(
    push_to_hub: str | None,
    private: bool = False,
    commit_message: str | None = None,
    replace_on_hub: bool = False,
) -> Destination | None:
    """Where the options say that an output goes; None: nowhere.

    Raises:
        UsageError: no ``org/name[@branch]``; or options of an upload without one.
    """
    if push_to_hub is None:
        given = {"--private": private, "--commit-message": commit_message, "--replace-on-hub": replace_on_hub}
        if stray := [option for option, value in given.items() if value]:
            raise UsageError(f"{', '.join(stray)}: nothing is uploaded without --push-to-hub ORG/NAME")
        return None
    repo, revision = parse_hub_id(push_to_hub, "--push-to-hub")
    return Destination(repo, revision, private, commit_message, replace_on_hub)


def destination_of(recipe: Recipe) -> Destination | None:
    """Where a job's output goes; see :func:`destination`."""
    return destination(recipe.push_to_hub, recipe.private, recipe.commit_message, recipe.replace_on_hub)


def exported_already(
    output: Path, source: Path, format_name: str | None, tensor_parallel: int, max_model_len: int | None
) -> Report | None:
    """:func:`made_already` of an export with these arguments."""
    report = Report.load(output)
    if report is None or report.conversion is None or report.quantization is not None:
        return None
    arguments = engine_arguments(
        open_checkpoint(output).config, tensor_parallel=tensor_parallel, max_model_len=max_model_len
    )
    same = {"vllm": vllm_config(arguments), **({"format": format_name} if format_name else {})}
    return made_already(output, source, same)


def made_already(output: Path, source: Path, same: Mapping[str, Any]) -> Report | None:
    """The report of an output that the same job has made before, so that only its upload is left; None where
    there is none, or one of another job.

    Args:
        same: keys of the report, as :meth:`Report.to_dict` has them, with the values that this job would give
            them.

    Raises:
        QuantError: it is of this job, but its tensors are not those that the report was written of.
    """
    report = Report.load(output)
    if report is None or Path(report.source_path).resolve() != source.resolve():
        return None
    value = report.to_dict()
    if any(value.get(k) != v for k, v in same.items()) or _newer(source, output):
        return None
    found = verify(output, target=report.quantization.target if report.quantization else "vllm")
    if found.failed or found.content_hash != report.output_hash:
        raise QuantError(
            f"{output}: was made by this job, but it is not any more what its report was written of "
            f"({'; '.join(found.failed[:3]) or 'other tensors'}): remove it to make it again"
        )
    return report


def _newer(source: Path, output: Path) -> bool:
    """Whether the source's weights were written after the output's."""
    made = max((f.stat().st_mtime for f in output.glob("*.safetensors")), default=0.0)
    return any(f.stat().st_mtime > made for f in source.glob("*.safetensors"))


def upload_problem(to: Destination) -> str | None:
    """Why an upload would be refused, as far as it can be told before there is anything to upload: the
    network, the token, the name, what the repository holds. Nothing is made on the Hub."""
    try:
        with _client(to) as api:
            _check_token(api, to)
            _check_repository(_branch(api, to), to)
    except QuantError as error:
        return str(error)
    return None


def upload(folder: str | Path, to: Destination, progress: Progress = silent) -> Uploaded:
    """Uploads a finished output in one commit. What a broken upload has sent is not sent again.

    Args:
        folder: of :func:`quant.quantize` or :func:`quant.export`. Its model card gets the repository's name.

    Raises:
        QuantError: with the reason; the folder is as it was.
    """
    folder = Path(folder)
    with _failing(folder, to), _client(to) as api:
        progress(Event("upload", detail=f"asking for {to.name}"))
        files = _contents(folder, to)
        url = str(api.create_repo(to.repo, private=to.private or None, exist_ok=True))
        there = _branch(api, to)
        _check_repository(there, to, files)
        adds = _sent(api, to, files, there.own, progress)
        progress(Event("upload", detail="committing"))
        if to.revision is not None:
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        commit = _commit(api, to, adds, there)
    changed, total = commit != there.sha, sum(map(_size, files.values()))
    what = f"{len(files)} files, {format_size(total)}" if changed else "it held all files already"
    progress(Event("upload", total, total, message=f"uploaded to {to.name}: {what}"))
    return Uploaded(to.repo, to.revision or "main", url, commit, total, changed)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sent(
    api: HfApi, to: Destination, files: Mapping[str, Path | bytes], own: bool, progress: Progress
) -> list[CommitOperationAdd]:
    """Sends the content of files, of which a commit is to be made."""
    from huggingface_hub import CommitOperationAdd

    total, sent, adds = sum(map(_size, files.values())), 0, []
    for name, file in files.items():
        size = _size(file)
        progress(Event("upload", sent, total, detail=f"{name}, {format_size(size)}"))
        adds.append(CommitOperationAdd(name, file))
        # what the repository's .gitignore leaves out is for sources, not for weights
        api.preupload_lfs_files(
            to.repo,
            [adds[-1]],
            revision=to.revision if own else None,  # a branch of its own is made with the commit
            free_memory=False,
            gitignore_content="",
        )
        sent += size
    return adds


def _commit(api: HfApi, to: Destination, adds: list[CommitOperationAdd], there: _Branch) -> str:
    """Makes the files a commit, with which others go where they shall; returns its name."""
    from huggingface_hub import CommitOperationDelete

    names = {a.path_in_repo for a in adds}
    gone = sorted(f.rfilename for f in there.files if to.replace or not there.own)
    deleted = [CommitOperationDelete(n) for n in gone if n not in names and not n.startswith(_GIT)]
    message = to.message or "Upload the output of quant"
    done = api.create_commit(to.repo, [*adds, *deleted], commit_message=message, revision=to.revision)
    return str(done.oid)


def _contents(folder: Path, to: Destination) -> dict[str, Path | bytes]:
    """What is uploaded, by its path in the repository: the folder's files, of which those for people name the
    repository, and no place on this machine."""
    report = Report.load(folder)
    if report is None:
        raise QuantError(
            f"{folder}: has no {REPORT}: outputs of quant quantize, smooth and export-vllm are uploaded; for "
            "others there is hf upload"
        )
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    contents: dict[str, Path | bytes] = {n: f for n, f in files.items() if not n.startswith(_GIT)}
    checkpoint, measured, public = open_checkpoint(folder), load_evaluation(folder), _public(report, to)
    text = card(report, checkpoint.config, source_card([folder]), measured_kl(measured), to.repo)
    made = {CARD: text, REPORT: public.to_json(), PAGE: page(public, checkpoint, measured)}
    return contents | {n: t.encode() for n, t in made.items()}


def _public(report: Report, to: Destination) -> Report:
    """The report with the last parts of paths alone: where a machine has its models is for no reader."""
    source = repository_of(Path(report.source_path)) or Path(report.source_path).name
    command, job = report.provenance.command, report.quantization
    if job is not None and (texts := job.settings.get("calibration_dataset")):
        names = re.findall(r"[\"']([^\"']+)[\"']", str(texts))
        settings = {**job.settings, "calibration_dataset": str([Path(n).name for n in names])}
        job = replace(job, settings=settings)
    return replace(
        report,
        output_path=to.repo,
        source_path=source,
        verify={**report.verify, "path": to.repo},
        quantization=job,
        provenance=replace(
            report.provenance,
            command=None if command is None else tuple(Path(w).name if "/" in w else w for w in command),
        ),
    )


@contextmanager
def _client(to: Destination) -> Iterator[HfApi]:
    """The Hub's client, silent and with the network allowed; refusals become errors that say what to do."""
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, logging

    if set_offline():
        raise QuantError(
            f"--push-to-hub {to.name}: HF_HUB_OFFLINE forbids the network: unset it, or leave --push-to-hub "
            "out; the same command with it uploads what was made then"
        )
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with online(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the Hub's on a card's metadata
            yield hub.HfApi(library_name="quant")
    except errors.HFValidationError as error:
        raise UsageError(f"--push-to-hub {to.name}: no name of a repository: {error_line(error)}") from error
    except (errors.HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise QuantError(f"--push-to-hub {to.name}: {_reason(error)}") from error
    except Exception as error:
        # what a network does is of many kinds, and its client's errors have no common one
        if not type(error).__module__.startswith(("httpx", "httpcore", "hf_xet")):
            raise
        raise QuantError(f"--push-to-hub {to.name}: {_reason(error)}") from error


@contextmanager
def _failing(folder: Path, to: Destination) -> Iterator[None]:
    """Says of an upload that failed that nothing is lost, and how to go on."""
    try:
        yield
    except QuantError as error:
        reason = str(error).removeprefix(f"--push-to-hub {to.name}: ")
        raise QuantError(
            f"--push-to-hub {to.name}: the upload failed: {reason}. "
            f"The output is made and verified in {folder}, nothing is lost: the same command uploads it alone"
        ) from error


def _reason(error: BaseException) -> str:
    """What the Hub or the network said, and what to do about it."""
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of one file of several
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no token is here: hf auth login, or HF_TOKEN with one that may write ({_TOKENS})"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = str(getattr(error, "server_message", "") or "").strip() or error_line(error)
    if status == 401:
        return f"the Hub does not take the token: hf auth login, or another HF_TOKEN ({_TOKENS})"
    if status == 403:
        return f"the token may not write there ({said}): a token that may, or another ORG ({_TOKENS})"
    if status == 429:
        return "the Hub answers no more for a while, there were too many requests: try again in some minutes"
    if status is not None:
        return f"the Hub answers {status} ({said})"
    return f"the Hub is not reached ({said}): check the network"


def _check_token(api: HfApi, to: Destination) -> None:
    """Whether the token of this machine may write what ``org/name`` names.

    The answer's keys are those of the Hub's API (``GET /api/whoami-v2``): ``name``, ``orgs`` with
    ``roleInOrg``, and the token's ``role``, of a fine-grained one with the permissions of each scope.

    Raises:
        QuantError: it may not.
    """
    me = api.whoami()
    owner = to.repo.partition("/")[0]
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise QuantError(
            f"--push-to-hub {to.name}: the token {token.get('displayName') or ''!r} may only read: hf auth "
            f"login, or HF_TOKEN, with one that may write ({_TOKENS})"
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list):
        names = {
            (scope.get("entity") or {}).get("name")
            for scope in scopes
            if "repo.write" in (scope.get("permissions") or [])
        }
        if not {owner, to.repo} & names:
            raise QuantError(
                f"--push-to-hub {to.name}: the token {token.get('displayName') or ''!r} may write "
                f"{', '.join(sorted(n for n in names if n)) or 'nowhere'}, not {owner}: give it that right "
                f"({_TOKENS}), or use another one"
            )
    orgs = {o.get("name"): o.get("roleInOrg") for o in me.get("orgs") or ()}
    if owner != me.get("name") and owner not in orgs:
        mine = ", ".join(sorted(str(n) for n in (me.get("name"), *orgs) if n))
        raise QuantError(
            f"--push-to-hub {to.name}: {owner!r} is not you, nor an organization that you are in: {mine}"
        )
    if orgs.get(owner) == "read":
        raise QuantError(
            f"--push-to-hub {to.name}: in {owner} you may only read: ask its administrators for the right to "
            "write, or name another repository"
        )


@dataclass(frozen=True)
class _Branch:
    """What a repository holds where the output goes.

    Attributes:
        files: as the Hub lists them, with ``rfilename``, ``size`` and ``lfs``.
        sha: its last commit; None of a repository, or a branch, that is not there.
        own: whether the files are the branch's own; a new branch has those of main, which stay there.
        public: whether everybody sees it.
    """

    files: tuple[Any, ...] = ()
    sha: str | None = None
    own: bool = True
    public: bool = False


def _branch(api: HfApi, to: Destination) -> _Branch:
    from huggingface_hub import errors

    try:
        main = api.model_info(to.repo, files_metadata=True)
    except errors.RepositoryNotFoundError:
        return _Branch()
    there, own = main, True
    if to.revision is not None:
        try:
            there = api.model_info(to.repo, revision=to.revision, files_metadata=True)
        except errors.RevisionNotFoundError:
            own = False
        own = own and (there.sha != main.sha or to.revision == "main")
    return _Branch(tuple(there.siblings or ()), there.sha, own, main.private is False)


def _check_repository(
    there: _Branch, to: Destination, files: Mapping[str, Path | bytes] | None = None
) -> None:
    """Whether an upload would do no harm to what is there.

    Args:
        files: those to upload, where they are made: the same ones may be there already.

    Raises:
        QuantError: a model is there, of which something would be lost or remain among the new files; or the
            repository is public and the upload is to be private.
    """
    if to.private and there.public:
        raise QuantError(
            f"--push-to-hub {to.name}: the repository is public, and --private is asked for: make it private "
            "in its settings, or name another one"
        )
    if to.replace or not there.own:
        return
    held = [f for f in there.files if f.rfilename.endswith(_MODEL)]
    others = [f.rfilename for f in held if files is None or not _same(f, files.get(f.rfilename))]
    if others:
        raise QuantError(
            f"--push-to-hub {to.name}: it holds a model already ({', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}): name another repository, a branch of its own "
            f"({to.repo}@NAME), or replace it with --replace-on-hub"
        )


def _same(remote: Any, content: Path | bytes | None) -> bool:
    """Whether a file on the Hub is that one: by its SHA-256 where it is a large one, else by its size."""
    from huggingface_hub.utils.sha import sha_fileobj

    if content is None or remote.size != _size(content):
        return False
    if remote.lfs is None or isinstance(content, bytes):
        return True
    with content.open("rb") as stream:
        return bool(remote.lfs.sha256 == sha_fileobj(stream).hex())
