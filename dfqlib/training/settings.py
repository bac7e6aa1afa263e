"""Settings that check and document themselves: each is declared once, with its type, default, meaning and bounds."""

import dataclasses
import inspect
import math
import textwrap
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from dfqlib.errors import InputError

__all__ = ["BF16", "BaseSettings", "setting"]

BF16 = "compute in bfloat16 where the processor has it; the result is always evaluated in float32"
"""What the setting ``bf16`` of many recipes means."""


def setting(default: Any, help: str, low: float = 0, high: float = math.inf) -> Any:
    """A field of a recipe's settings.

    Args:
        default: its value unless another one is given.
        help: what it means, for the docstring and the command line.
        low: smallest value of a number.
        high: largest value of a number.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


class BaseSettings:
    """Base of the settings of all recipes.

    A subclass is a frozen dataclass whose fields are made by ``setting``; a field of a base class that gets a plain new
    default keeps its meaning and bounds. All fields are listed in the docstring, and checked when an instance is made:
    a field declared ``int`` must be whole, ``float`` a number, ``bool`` True or False, ``Literal`` one of its words.
    What recipes with given images inherit is declared with ``eq=False``, since images cannot be compared by ``==``.

    Attributes:
        meanings: what each field means and which values it takes, by name.
    """

    meanings: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        bases = [vars(base).get("__dataclass_fields__", {}) for base in reversed(cls.__mro__[1:])]
        fields: dict[str, Any] = {name: item for base in bases for name, item in base.items()}
        for name in inspect.get_annotations(cls):
            value = vars(cls)[name]
            if not isinstance(value, dataclasses.Field):
                known = fields[name].metadata if name in fields else {}
                value = dataclasses.field(default=value, metadata=known)
                setattr(cls, name, value)
            fields[name] = value
        kinds = get_type_hints(cls)
        cls.meanings = {name: _meaning(item, kinds[name]) for name, item in fields.items()}
        listed = [
            textwrap.fill(f"{name}: {meaning}.", 120, initial_indent="    ", subsequent_indent="        ")
            for name, meaning in cls.meanings.items()
        ]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *listed])

    def __post_init__(self: Any) -> None:
        """Raise InputError for the first field that is of another type, out of its bounds or infinite."""
        kinds = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            _check(item, kinds[item.name], getattr(self, item.name))


def _meaning(item: Any, kind: Any) -> str:
    allowed = _words(kind) if get_origin(kind) is Literal else ""
    if kind in (int, float):
        allowed = _bounds(item).removeprefix(" of ").strip()
    return item.metadata.get("help", "") + (f" ({allowed})" if allowed else "")


def _check(item: Any, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise InputError(f"{item.name}={value!r} must be {_words(kind)}")
    if kind is bool and not isinstance(value, bool):
        raise InputError(f"{item.name}={value!r} must be True or False")
    if kind not in (int, float):
        return
    if isinstance(value, float) and math.isinf(value):
        raise InputError(f"{item.name}={value!r} must be finite")
    low, high = item.metadata.get("low", -math.inf), item.metadata.get("high", math.inf)
    types, noun = (int, "a whole number") if kind is int else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
        raise InputError(f"{item.name}={value!r} must be {noun}{_bounds(item)}")


def _words(kind: Any) -> str:
    return " or ".join(f'"{word}"' for word in get_args(kind))


def _bounds(item: Any) -> str:
    low, high = item.metadata.get("low", -math.inf), item.metadata.get("high", math.inf)
    if high < math.inf:
        return f" from {low} to {high}"
    return f" of at least {low}" if low > -math.inf else ""
