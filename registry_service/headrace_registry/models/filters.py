"""The filter of ListModels: terms joined by AND, as `state = READY AND id : smol AND labels.team = "a b"`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from headrace_registry.errors import FieldInvalid
from headrace_registry.models.models import ModelState, Quantization

_TERM = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_.-]*)\s*([=:])\s*("(?:[^"\\]|\\.)*"|[^\s"=:]+)\s*')
_AND = re.compile(r"AND(?=\s)")
_FIELDS = ("id", "state", "model_type", "quantization", "repo_id")
_MAX_LENGTH = 1024
_MAX_TERMS = 16


class Match(StrEnum):
    """How a term compares."""

    EQUALS = "="
    CONTAINS = ":"


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One comparison; `label` is the label's key if `field` is `labels`."""

    field: str
    match: Match
    value: str
    label: str = ""

    @classmethod
    def of(cls, name: str, operator: str, raw: str) -> Term:
        """Makes a term from its three parts as written. Raises FieldInvalid for an unknown field or value."""
        value = re.sub(r"\\(.)", r"\1", raw[1:-1]) if raw.startswith('"') else raw
        if "\x00" in value:
            raise FieldInvalid("filter", "a value contains NUL")
        match = Match(operator)
        if name.startswith("labels.") and len(name) > len("labels."):
            return cls(field="labels", label=name.removeprefix("labels."), match=match, value=value)
        if name not in _FIELDS:
            raise FieldInvalid("filter", f"unknown field {name!r}; known: {', '.join(_FIELDS)}, labels.KEY")
        if match is Match.EQUALS and name == "state" and value not in set(ModelState):
            raise FieldInvalid("filter", f"unknown state {value!r}; known: {', '.join(ModelState)}")
        if match is Match.EQUALS and name == "quantization" and value not in set(Quantization):
            raise FieldInvalid("filter", f"unknown quantization {value!r}; known: {', '.join(Quantization)}")
        return cls(field=name, match=match, value=value)


def parse_filter(text: str) -> tuple[Term, ...]:
    """Parses a filter; an empty one matches every model. Raises FieldInvalid with the place and the known names."""
    if not text.strip():
        return ()
    if len(text) > _MAX_LENGTH:
        raise FieldInvalid("filter", f"longer than {_MAX_LENGTH} characters")
    terms: list[Term] = []
    position = 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            raise FieldInvalid(
                "filter", f"expected `field = value` or `field : value` at {text[position : position + 20]!r}"
            )
        terms.append(Term.of(*found.groups()))
        position = found.end()
        if position == len(text):
            break
        joined = _AND.match(text, position)
        if joined is None:
            raise FieldInvalid("filter", f"expected AND at {text[position : position + 20]!r}")
        position = joined.end()
    if len(terms) > _MAX_TERMS:
        raise FieldInvalid("filter", f"more than {_MAX_TERMS} terms")
    return tuple(terms)
