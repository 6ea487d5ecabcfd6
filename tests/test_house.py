"""The rules of the house that a type checker does not see: what vLLM is stands in ``quant.vllm`` alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from quant.vllm.releases import VLLM_VERSION

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *(ROOT / "quant").rglob("*.py"))
    if "vllm" not in path.relative_to(ROOT).parts
)
#: A release as words have it: that of today anywhere, another one behind the name (vLLM 0.8.5, vllm>=0.11).
RELEASE = re.compile(rf"(?<![\w.]){re.escape(VLLM_VERSION)}(?![\w%])|(?i:vllm)[\s\"'`(<>=~v]{{1,12}}0\.\d+")
#: Their docstrings say in which release a contract was read.
CITED = {f"quant/formats/{name}.py" for name in ("awq", "compressed_tensors", "fp8", "gptq")}


def words(source: str) -> str:
    """All strings and comments of a program."""
    kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


def without_docstrings(source: str) -> str:
    """The words of a program but those of its docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(n, clean=False) for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
    left = words(source)
    for text in texts:
        left = left.replace(text or "", "")
    return left


def compared(tree: ast.AST) -> list[str]:
    """Comparisons with a release or a compute capability: one side is a tuple of two or three whole numbers,
    or a part of a ``capability`` or ``version``."""

    def is_level(node: ast.expr) -> bool:
        numbers = isinstance(node, ast.Tuple) and len(node.elts) in (2, 3)
        return numbers and all(isinstance(e, ast.Constant) and type(e.value) is int for e in node.elts)

    def is_part(node: ast.expr) -> bool:
        return isinstance(node, ast.Subscript) and bool(re.search("capability|version", ast.unparse(node)))

    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and not any(isinstance(op, (ast.In, ast.NotIn, ast.Is, ast.IsNot)) for op in node.ops)
        and any(is_level(side) or is_part(side) for side in (node.left, *node.comparators))
    ]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_release_and_no_compute_capability_stands_outside_the_room_of_vllm(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    said = without_docstrings(source) if name in CITED else words(source)
    named = [match[0] for match in RELEASE.finditer(said)]
    assert not named, f"{name} names {named}: quant.vllm.releases is the place"
    assert not compared(ast.parse(source)), f"{name}: such a rule belongs into quant.vllm"


def test_the_check_sees_what_it_looks_for() -> None:
    for text in ('"vLLM 0.8.5 refuses"', "# vLLM (0.19)", f'"since {VLLM_VERSION}, {{x}}"', '"vllm>=0.11"'):
        assert RELEASE.search(words(text)), text
    for text in ('"0.25 GiB"', '"peft==0.13.2"', VLLM_VERSION, '"vLLM, 0.9 to 1.0 times"'):
        assert not RELEASE.search(words(text)), text
    for text in ("rules.version >= (0, 17, 0)", "gpu.capability < (8, 9)", "(c or (0, 0)) >= (8, 0)"):
        assert compared(ast.parse(text)), text
    for text in ("gpu.capability[0] == 10", "version[1] > 3"):
        assert compared(ast.parse(text)), text
    for text in ("gpu.capability is None", "x.shape == (n, k)", "names[0] == 'a'"):
        assert not compared(ast.parse(text)), text


def test_every_package_is_one_that_is_installed() -> None:
    """A room that pyproject.toml does not list is missing from the wheel, and there alone."""
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert listed is not None
    rooms = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "quant").rglob("__init__.py")}
    assert rooms - set(re.findall(r'"([\w.]+)"', listed[1])) == set()
