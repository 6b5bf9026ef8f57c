"""Arguments are checked by their annotations: what is accepted, converted and refused, and how the refusal reads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
import torch

from bayeslm.validation import Count, Positive, Seed, Share, Within, validated

if TYPE_CHECKING:
    from nowhere import Unknown


@validated
@dataclass(frozen=True)
class Settings:
    count: Count = 1
    seed: Seed | None = None
    beta: Positive = 1.0
    share: Share = 0.5
    half_open: Annotated[float, Within("(0, 1]")] = 0.5
    two: Annotated[int, Within("[2, inf)")] = 2
    bound: float = math.inf
    name: str = "a"
    flag: bool = True
    scheme: Literal["one", "two", "three"] = "one"
    path: str | os.PathLike[str] = "a"
    function: Callable[[int], int] | None = None
    numbers: Sequence[float] = ()
    either: np.ndarray | Sequence[int] = ()
    names: list[str] | None = None
    by_name: Mapping[str, Positive] | None = None
    pair: tuple[Share, Share] = (0.0, 1.0)
    later: Unknown | None = None
    anything: Any = None


REFUSED = [
    ("count", 0, ValueError, "a positive whole number"),
    ("count", 2.0, TypeError, "got 2.0"),
    ("count", True, TypeError, "got True"),
    ("count", np.bool_(True), TypeError, "bool"),
    ("count", None, TypeError, "None"),
    ("count", "3", TypeError, "'3'"),
    ("count", math.nan, TypeError, "nan"),
    ("count", np.int64(-3), ValueError, "-3"),
    ("count", 2**63, ValueError, r"below 2 \*\* 63"),
    ("count", torch.tensor([1]), TypeError, "a Tensor"),
    ("count", torch.tensor(1, device="meta"), TypeError, "a Tensor"),
    ("seed", -1, ValueError, r"in \[0, 4294967295\] or None"),
    ("seed", 2**32, ValueError, "4294967296"),
    ("beta", 0, ValueError, "positive and finite"),
    ("beta", math.inf, ValueError, "inf"),
    ("beta", math.nan, ValueError, "nan"),
    pytest.param("beta", 10**400, ValueError, "positive and finite", id="beta-huge"),
    ("beta", "0.5", TypeError, "'0.5'"),
    ("beta", 1j, TypeError, "1j"),
    ("beta", [0.5], TypeError, r"\[0.5\]"),
    ("beta", torch.tensor(0.5, requires_grad=True), TypeError, "a Tensor"),  # its gradient would be lost
    ("share", 1.5, ValueError, r"in \[0, 1\]"),
    ("half_open", 0, ValueError, r"in \(0, 1\]"),
    ("two", 1, ValueError, "a whole number of at least 2"),
    ("bound", math.nan, ValueError, "a number, got nan"),
    ("name", 3, TypeError, "a string"),
    ("name", None, TypeError, "None"),
    ("flag", 1, TypeError, "True or False"),
    ("flag", "yes", TypeError, "'yes'"),
    ("scheme", "four", ValueError, "one of 'one', 'two', 'three', got 'four'"),
    ("scheme", 1, TypeError, "got 1"),
    ("path", 3, TypeError, "a string or a path"),
    ("function", 3, TypeError, "a function or None"),
    ("function", lambda: 0, TypeError, "a function of 1 argument, got"),
    ("function", divmod, TypeError, "a function of 1 argument, got"),
    ("numbers", "abc", TypeError, r"a list, each a number, got 'abc': write \['abc'\]"),
    ("numbers", 3, TypeError, "got 3"),
    ("numbers", {"a": 1}, TypeError, "got {'a': 1}"),
    ("numbers", np.array(1.0), TypeError, "array"),
    ("names", ["a", 3], TypeError, "got 3"),
    ("names", "abc", TypeError, r"write \['abc'\]"),
    ("by_name", {"a": 0.0}, ValueError, "got 0.0"),
    ("by_name", [], TypeError, "a mapping to positive and finite or None"),
    ("pair", (0.5,), TypeError, "2 values"),
    ("pair", (0.5, 2.0), ValueError, "got 2.0"),
]
PLACES = {"names": (["a", 3], r"names\[1\] must be a string, got 3")}
PLACES |= {"by_name": ({"a": 0.0}, r"by_name\['a'\] must be positive and finite, got 0.0")}
PLACES |= {"pair": ((0.5, 2.0), r"pair\[1\] must be a number in \[0, 1\], got 2.0")}


@pytest.mark.parametrize(("name", "value", "error", "says"), REFUSED)
def test_a_wrong_argument_is_refused_by_name_with_its_value(name, value, error, says):
    with pytest.raises(error, match=rf"^Settings: {name}\b.* must be .*{says}"):
        Settings(**{name: value})
    with pytest.raises(error, match=rf"^Settings: {name}\b"):
        replace(Settings(), **{name: value})


@pytest.mark.parametrize("name", PLACES)
def test_a_wrong_element_is_named_by_its_place(name):
    value, says = PLACES[name]
    with pytest.raises((TypeError, ValueError), match=f"^Settings: {says}$"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", np.int64(3), 3),
        ("count", torch.tensor(3), 3),
        ("beta", np.float32(0.5), 0.5),
        ("beta", 2, 2),
        ("beta", 10**30, 1e30),  # as a tensor it would not fit
        ("bound", -math.inf, -math.inf),
        ("numbers", np.array([0.5, 1.0]), [0.5, 1.0]),
        ("numbers", torch.tensor([1, 2]), [1, 2]),
        ("numbers", (np.float64(1.0), 2), (1.0, 2)),
        ("names", ("a", "b"), ("a", "b")),
        ("by_name", {"a": np.float32(0.5)}, {"a": 0.5}),
        ("pair", [0, 1], (0, 1)),
        ("later", object, object),
    ],
)
def test_numbers_of_other_libraries_become_pythons(name, value, expected):
    given = getattr(Settings(**{name: value}), name)
    assert given == expected
    assert type(given) is type(expected)
    if isinstance(given, list | tuple):
        assert {type(x) for x in given} <= {int, float, str}


def test_what_is_right_is_passed_on_itself():
    array, numbers, names = np.arange(2), [0.5, 1], ["a"]
    settings = Settings(either=array, numbers=numbers, names=names, function=len)
    assert settings.either is array
    assert settings.numbers is numbers
    assert settings.names is names


def test_functions_methods_and_subclasses():
    @validated
    class Base:
        def __init__(self, size: Count, *rest: int, flag: bool = False, **more: int) -> None:
            self.size = size

    class Derived(Base):
        def __init__(self, size: int) -> None:
            super().__init__(size)

        @classmethod
        @validated
        def made(cls, size: Count) -> Derived:
            return cls(size)

        @validated
        def times(self, factor: Positive) -> float:
            """Times."""
            return self.size * factor

    assert Base(2, "x", y="z").size == 2
    assert Derived.made(np.int64(2)).times(1.5) == 3.0
    assert Derived.times.__doc__ == "Times."
    with pytest.raises(ValueError, match=r"^Derived: size must be"):
        Derived(0)
    with pytest.raises(ValueError, match=r"Derived.made: size must be"):
        Derived.made(0)
    with pytest.raises(ValueError, match=r"Derived.times: factor must be"):
        Derived(1).times(factor=-1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Base()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        Settings(sise=3)


def test_an_inherited_method_is_named_after_the_class_of_the_object():
    class Base:
        @validated
        def draw(self, size: Count) -> int:
            return size

    class Derived(Base):
        pass

    assert Derived().draw(2) == 2
    with pytest.raises(ValueError, match=r"^Derived\.draw: size must be a positive whole number, got 0"):
        Derived().draw(0)
