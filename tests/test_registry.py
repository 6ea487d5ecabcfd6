"""Names and what stands behind them: the project's own, and those of other packages, of which one that is
broken disturbs nobody."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.errors import UsageError
from quant.outlier_suppression.base import OutlierSuppressionRegistry
from quant.quantizers import QuantizerRegistry
from quant.registry import Registry

METHOD = """
class Good:
    needs = frozenset()
    def __call__(self, weight, statistics, scheme, dtype, amax=None): ...
class Complete(Good):
    name, suppressor = "other", "smooth_quant"
    @staticmethod
    def refuse(scheme): return "no"
class NoNeeds:
    def __call__(self): ...
class NoCall:
    needs = frozenset()
class OddNeeds(Good):
    needs = ["hessian"]
class UnknownNeeds(Good):
    needs = frozenset({"moon"})
def function(): ...
imported = __import__("builtins").print
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a package on the path, with metadata as pip writes it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(module: str, code: str, group: str, points: dict[str, str], version: str = "1.0") -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
        )
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def methods() -> Registry[Any]:
    """A registry of methods of its own, with one entry."""
    registry: Registry[Any] = Registry(
        "method", "quant.quantizers", QuantizerRegistry._wrong, QuantizerRegistry._defaults
    )
    registry.add("mine", object)
    return registry


def test_an_unknown_name_lists_the_known_ones_with_those_of_other_packages(
    package: Callable[..., None],
) -> None:
    package("their_a", METHOD, "quant.quantizers", {"theirs": "their_a:Good"})
    registry = methods()
    assert registry.names() == ["mine", "theirs"] and "theirs" in registry and "yours" not in registry
    with pytest.raises(UsageError, match=r"method is 'thiers': did you mean 'theirs'\? Known: mine, theirs"):
        registry.get("thiers")
    assert "their_a" not in sys.modules


def test_what_a_class_leaves_out_is_as_the_protocol_has_it(package: Callable[..., None]) -> None:
    package("their_b", METHOD, "quant.quantizers", {"good": "their_b:Good", "complete": "their_b:Complete"})
    registry = methods()
    complete = registry.get("complete")
    assert (complete.name, complete.suppressor, complete().refuse(None)) == ("other", "smooth_quant", "no")
    good = registry.get("good")
    assert (good.name, good.suppressor, good.refuse(None), good().refuse(None)) == ("good", "", None, None)
    assert registry.get("good") is good and list(registry) == [object, good, complete]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "their_c:Missing",
            r"their_c:Missing of the package their_c 2.1 cannot be loaded \(AttributeError: .*Missing.*\): "
            r"repair or update",
        ),
        (
            "no_such_module:X",
            r"no_such_module:X of the package their_c 2.1 cannot be loaded \(ModuleNotFoundError: "
            r".*no_such_module",
        ),
        (
            "their_c:NoNeeds",
            r"their_c:NoNeeds of the package their_c 2.1 is none: it has no needs: docs/extension_guide.md",
        ),
        ("their_c:NoCall", "is none: it has no __call__"),
        ("their_c:OddNeeds", r"needs is \['hessian'\]: a set of .*hessian.*, or an empty one"),
        ("their_c:UnknownNeeds", r"needs is frozenset\(\{'moon'\}\)"),
        ("their_c:function", "it is not a class but function"),
    ],
)
def test_a_package_that_is_at_fault_is_named_and_only_when_it_is_asked_for(
    value: str, said: str, package: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    package("their_c", METHOD, "quant.quantizers", {"theirs": value}, version="2.1")
    registry = methods()
    assert registry.get("mine") is object and registry.names() == ["mine", "theirs"]
    for _ in range(2):
        with pytest.raises(UsageError, match=said) as refused:
            registry.get("theirs")
        assert str(refused.value).startswith("method 'theirs': ")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(registry) == [object]
    assert [r.message.startswith("left out: method 'theirs'") for r in caplog.records] == [True]


@pytest.mark.parametrize(
    "code", ["raise RuntimeError('two\\n  lines')", "import no_such_thing", "x = (", "raise KeyError(1)"]
)
def test_a_module_that_fails_while_it_is_imported_is_named_with_its_reason(
    code: str, package: Callable[..., None]
) -> None:
    package("their_d", code, "quant.quantizers", {"theirs": "their_d:X"})
    with pytest.raises(
        UsageError,
        match=r"^method 'theirs': their_d:X of the package their_d 1.0 cannot be loaded \(\w+: [^\n]*\): "
        r"repair",
    ):
        methods().get("theirs")


def test_a_name_that_is_taken_is_refused_when_it_is_asked_for(package: Callable[..., None]) -> None:
    package("their_e", METHOD, "quant.quantizers", {"mine": "their_e:Good", "shared": "their_e:Good"})
    package("their_f", METHOD, "quant.quantizers", {"shared": "their_f:Good", "alone": "their_f:Good"})
    registry = methods()
    assert registry.get("alone").name == "alone"
    with pytest.raises(
        UsageError,
        match="method 'mine': the package their_e 1.0 declares this name, which quant itself has: uninstall "
        "it",
    ):
        registry.get("mine")
    with pytest.raises(
        UsageError,
        match=r"method 'shared': the package their_[ef] 1.0 and the package their_[ef] 1.0 both declare "
        r"this name",
    ):
        registry.get("shared")
    assert list(registry)[0] is object and len(list(registry)) == 2


def test_a_suppressor_says_where_it_folds(package: Callable[..., None]) -> None:
    code = (
        METHOD + "class Where(Good):\n    sources = frozenset({'norm'})\nclass Nowhere(Good):\n    sources = "
        "frozenset({'moon'})\n"
    )
    package(
        "their_g",
        code,
        "quant.outlier_suppression",
        {n.lower(): f"their_g:{n}" for n in ("Where", "Nowhere", "Good")},
    )
    registry: Registry[Any] = Registry(
        "outlier suppressor", "quant.outlier_suppression", OutlierSuppressionRegistry._wrong
    )
    assert registry.get("where").name == "where"
    with pytest.raises(UsageError, match=r"sources is frozenset\(\{'moon'\}\): a set of linear, norm"):
        registry.get("nowhere")
    with pytest.raises(UsageError, match="it has no sources"):
        registry.get("good")


def test_a_format_and_a_model_family_are_checked_too(package: Callable[..., None]) -> None:
    from quant.formats.base import FormatRegistry
    from quant.models.adapter import ModelRegistry

    code = "class Half:\n    name = 'half'\n    quant_method = 'half'\nhalf = Half()\n"
    for group, known, said in (
        (
            "quant.formats",
            FormatRegistry,
            "it is not an object of a class derived from quant.formats.Format but Half",
        ),
        ("quant.models", ModelRegistry, "it is not a ModelAdapter but Half"),
    ):
        module = "their_" + group.rpartition(".")[2]
        package(module, code, group, {"half": f"{module}:half"})
        registry: Registry[Any] = Registry(known.what, group, known._wrong)
        with pytest.raises(UsageError, match=said):
            registry.get("half")


def test_a_scheme_has_the_name_it_is_declared_under_and_numbers_of_its_own(
    package: Callable[..., None],
) -> None:
    from quant.schemes import SchemeRegistry

    code = (
        "from quant.schemes import Scheme, SchemeRow, WeightScheme\n"
        "good = SchemeRow(Scheme('good', WeightScheme(4, 16)), ('minmax',))\n"
        "taken = SchemeRow(Scheme('taken', WeightScheme(4, 128)))\n"
        "scheme = good.scheme\n"
    )
    points = {
        "good": "their_h:good",
        "better": "their_h:good",
        "taken": "their_h:taken",
        "bare": "their_h:scheme",
    }
    package("their_h", code, "quant.schemes", points)
    registry: Registry[Any] = Registry("scheme", "quant.schemes", SchemeRegistry._wrong, named=True)
    assert registry.names() == ["bare", "better", "good", "taken"] and registry.loaded() == []
    assert "their_h" not in sys.modules
    assert registry.get("good").methods == ("minmax",) and registry.loaded() == [registry.get("good")]
    for name, said in (
        ("better", "it calls itself 'good'"),
        ("taken", "its numbers are those of scheme 'w4a16'"),
        ("bare", "it is not a quant.schemes.SchemeRow but Scheme"),
    ):
        with pytest.raises(UsageError, match=f"scheme '{name}': .* is none: {said}"):
            registry.get(name)


def test_a_name_is_added_once() -> None:
    registry = methods()
    with pytest.raises(UsageError, match="method 'mine' is already registered"):
        registry.register("mine")(int)
