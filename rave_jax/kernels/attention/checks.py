"""Whether operands belong together: one error that names the operand, what was found and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rave_jax.kernels.attention.score import Shape, Term, check, function_of, name_of, reads_dot
from rave_jax.typing import Array


class TermShapes(NamedTuple):
    """Shapes of a term's operands: what belongs to queries and to keys (channels beside them are further axes), the
    switches of keys, and the number of query heads."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    keys_on: tuple[int, ...]
    heads: int


def check_terms(operation: str, terms: Sequence[Term], shapes: TermShapes, beside: str) -> None:
    """Refuse terms whose operands do not fit, whose functions do not give what they should, and two that read `dot`.

    Raises:
        ValueError: names the operand or the function.
    """
    readers = []
    for n, term in enumerate(terms):
        name = f"terms[{n}]"
        if (term.u is None) != (term.w is None):
            alone = "u" if term.w is None else "w"
            raise ValueError(f"{operation} operand {name} has {alone} alone, expected both u and w or neither")
        expected: dict[str, tuple[Array, tuple[int, ...], str]] = {}
        if term.u is not None and term.w is not None:
            if term.u.ndim != len(shapes.queries) + 1 or term.u.shape[-1] == 0:
                wanted = ", ".join(map(str, (*shapes.queries, "rank")))
                raise ValueError(f"{operation} operand {name}.u has shape {term.u.shape}, expected [{wanted}]")
            r = term.u.shape[-1]
            expected[f"{name}.u"] = (term.u, (*shapes.queries, r), "float32")
            expected[f"{name}.w"] = (term.w, (*shapes.keys, r), "float32")
        sides = {
            "query": (term.query, shapes.queries),
            "key": (term.key, shapes.keys),
            "head": (term.head, (shapes.heads,)),
        }
        for side, (features, shape) in sides.items():
            expected |= {f"{name}.{side}[{key!r}]": (x, shape, "float32") for key, x in features.items()}
        if term.query_on is not None:
            expected[f"{name}.query_on"] = (term.query_on, shapes.queries, "bool")
        if term.key_on is not None:
            expected[f"{name}.key_on"] = (term.key_on, shapes.keys_on, "bool")
        refuse(operation, expected, beside)
        function, shape = function_of(term.function), Shape.of(term)
        check(function, shape)
        if reads_dot(function, shape):
            readers.append(name_of(function))
    if len(readers) > 1:
        raise ValueError(
            f"{operation} has {len(readers)} score functions that read dot, {' and '.join(readers)}, and only one may: "
            "write them as one function"
        )


def refuse(operation: str, expected: Mapping[str, tuple[Array, tuple[int, ...], str]], beside: str) -> None:
    """Refuse the first operand whose shape, or else whose type, is not the expected one.

    Args:
        operation: whose operands they are.
        expected: by name: operand, shape and type.
        beside: what the error says of the operand that gives the sizes.

    Raises:
        ValueError: names the operand.
    """
    for name, (x, shape, _) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{operation} operand {name} has shape {tuple(x.shape)}, expected {shape} {beside}")
    for name, (x, _, dtype) in expected.items():
        if x.dtype != dtype:
            raise ValueError(f"{operation} operand {name} is {x.dtype}, expected {dtype}")
