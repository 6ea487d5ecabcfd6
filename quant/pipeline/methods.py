"""The methods and suppressors that a job names, with their settings checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from quant.errors import UsageError, clipped
from quant.outlier_suppression import OutlierSuppressionRegistry, Suppressor
from quant.quantizers import Quantizer, QuantizerRegistry
from quant.recipe import Assignment, Recipe


def make_quantizer(assignment: Assignment) -> Quantizer:
    """The method of an assignment with the settings it has.

    Raises:
        UsageError: unknown method, or an option that this method does not have.
    """
    return _configured(
        QuantizerRegistry.get(assignment.method), f"--method {assignment.method}", dict(assignment.options)
    )


def make_suppressor(name: str, alpha: float | str | None) -> Suppressor:
    """
    Raises:
        UsageError: unknown name, or one that has no alpha.
    """
    kind = OutlierSuppressionRegistry.get(name)
    return _configured(kind, f"--outlier-suppression {name}", {} if alpha is None else {"alpha": alpha})


def suppressor_of(assignment: Assignment, alpha: float | str | None) -> Suppressor | None:
    """What scales the inputs of an assignment's linears: the suppressor that it names, or else the one that
    is part of its method. ``alpha``: for suppressors that have one.

    Raises:
        UsageError: unknown name, or a wrong alpha.
    """
    name = assignment.outlier_suppression or QuantizerRegistry.get(assignment.method).suppressor
    if not name or name == "none":
        return None
    return make_suppressor(name, alpha if takes_alpha(name) else None)


def takes_alpha(name: str) -> bool:
    """Whether ``--alpha`` is a setting of a suppressor."""
    kind = OutlierSuppressionRegistry.get(name)
    return is_dataclass(kind) and "alpha" in [f.name for f in fields(kind)]


def calibrated(recipe: Recipe, assignment: Assignment) -> bool:
    """Whether calibration text is run for an assignment: its method, its suppressor, its activations or the
    job's KV cache ask for some."""
    quantizer, activations = make_quantizer(assignment), assignment.scheme.activations
    suppressor = suppressor_of(assignment, recipe.alpha)
    suppressed = suppressor is not None and bool(suppressor.needs)
    stored = activations is not None and activations.calibrated
    return bool(quantizer.needs) or suppressed or stored or recipe.kv_cache_scheme is not None


def _configured(kind: Callable[..., Any], what: str, options: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for option in options:
        if option not in known:
            raise UsageError(
                f"--{str(option).replace('_', '-')} is not an option of {what}: "
                f"{'it has ' + ', '.join(known) if known else 'it has none'}"
            )
    if wrong := _wrong_types(kind, options):
        raise UsageError(f"{what}: {'; '.join(wrong)}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}: {error}") from error


def _wrong_types(kind: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Settings that are not of their field's type: dataclasses take anything, and a text for a number would
    be noticed in the middle of the work."""
    try:
        hints = get_type_hints(kind)
    except NameError:
        return []  # an extension's types that only a type checker knows
    wrong = []
    for name, value in options.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except PydanticSchemaGenerationError:
            continue  # a type of the extension's own: it judges itself
        except ValidationError as error:
            kinds = " or ".join(
                dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors())
            )
            wrong.append(f"{name} is {clipped(value)}: must be {kinds}")
        else:
            if isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"{name} is {value}: must be a finite number")
    return wrong
