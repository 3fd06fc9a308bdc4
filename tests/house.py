"""Measures the house: rooms, functions and words. `python tests/house.py [FOLDER] [--check]` prints a table.

FOLDER is a checkout, this one by default. Its packages are the wheel's in pyproject.toml, so older checkouts can be
measured too. `--check` ends with 1 when a number is past its limit. Generated stubs count nowhere.
"""

import argparse
import ast
import copy
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICES = {
    "registry": ("headrace_registry", "registry_service"),
    "extractor": ("headrace_extractor", "extractor_service"),
}
# In these packages a folder is a room by noun. The log, the chassis and the stubs are one room each by design.
ROOMED = (*SERVICES["registry"], *SERVICES["extractor"], "headrace_client", "headrace_cli", "headrace_train")
ASIDE = ("tests", "bench", "deploy")

MAX_FREE_RELATIVES = 2.5
MAX_PERSONS = 1.0
MAX_SINGLE_USE_PERCENT = 12.0
MAX_FLAT_MODULES = 5
MAX_ROOM_MODULES = 14
MAX_FUNCTION_LINES = 70
MAX_MANIFEST_LOADS = 0
MAX_WINDOW_ENCODINGS = 1

# A free relative leaves its noun out: "what is there" for "the rows on disk".
_AFTER_WHAT = (
    "is was it they a an the others nobody somebody there came comes goes holds has may must will would can this one"
)
FREE_RELATIVE = re.compile(rf"(?<!\?)\b[Ww]hat (?:{'|'.join(_AFTER_WHAT.split())})\b")
# Programs are not persons.
PERSON = re.compile(r"\b(?:who|whom|whose|whoever|nobody|somebody|everybody|anybody)\b")

# A set is loaded in one place, so that nothing else holds a copy of it that has gone stale.
MANIFEST_LOAD = re.compile(r"\b(?:Manifest\.load|SegmentIndex\.load|Manifest\.update)\b|(?<!def )\bdropped_rows\(")
# The ways in which a set was once known to be a WINDOW set. `ActivationSet.kind` is the one left.
WINDOW_ENCODINGS = {
    "the folder's name": re.compile(r"\.window-|\bWINDOW_MARK\b"),
    "is_window of the spec's Retention": re.compile(
        r"\bclass Retention\b(?:(?!\nclass ).)*\bdef is_window\b", re.DOTALL
    ),
    "an attribute _is_window": re.compile(r"\._is_window\b"),
    "the manifest's retention as a string": re.compile(r"\bmanifest\.retention\b|\.retention =="),
    "the presence of a window": re.compile(r"\b_window is not None"),
}
WINDOW_KIND = re.compile(r"\bclass ActivationSet\b(?:(?!\nclass ).)*\bself\.kind\b", re.DOTALL)

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """One Python file, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, FUNCTION)]

    @cached_property
    def comments(self) -> list[str]:
        """Comments without those that are read by tools."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return [comment.lstrip("# ") for comment in comments if not re.search("noqa|type:", comment)]

    @cached_property
    def prose(self) -> str:
        docstrings = [ast.get_docstring(node) or "" for node in ast.walk(self.tree) if isinstance(node, DOCUMENTED)]
        return " ".join([*docstrings, *self.comments])

    @cached_property
    def code(self) -> str:
        """The code alone: no comments, no docstrings, one spelling of quotes."""
        tree = copy.deepcopy(self.tree)
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        return ast.unparse(tree)

    @cached_property
    def n_single_use(self) -> int:
        """Private functions with one use of their name in this file; table entries and callbacks are among them."""
        nodes = list(ast.walk(self.tree))
        uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
        return sum(uses[name] == 1 for name in (f.name for f in self.functions) if re.match("_(?!_)", name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    value: float | str
    limit: float | None = None
    unit: str = ""
    details: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.limit is None or (not isinstance(self.value, str) and self.value <= self.limit)


def sources_in(folder: Path) -> list[Source]:
    found = (path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name)
    return [Source(path) for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def per_thousand(rule: re.Pattern[str], sources: list[Source]) -> float:
    words = " ".join(source.prose for source in sources)
    return round(1000 * len(rule.findall(words)) / max(1, len(re.findall(r"[A-Za-z']+", words))), 1)


def percent(part: int, whole: int) -> float:
    return round(100 * part / max(1, whole), 1)


def rooms_of(package: Path, sources: list[Source]) -> Counter[str]:
    """Modules per folder; `__init__.py` is the room's door, not a module."""
    modules = [source.path for source in sources if source.path.name != "__init__.py"]
    return Counter(path.parent.relative_to(package.parent).as_posix() for path in modules)


def measure(root: Path) -> list[Row]:
    """Returns the table of the checkout `root`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [root / folder for folder in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    by_package = {package: sources_in(package) for package in packages}
    ours = [source for sources in by_package.values() for source in sources]
    rows = [Row(name="top-level import names", value=len(packages), details=tuple(sorted(p.name for p in packages)))]

    rooms: Counter[str] = Counter()
    for package, sources in by_package.items():
        if package.name in ROOMED:
            rooms += rooms_of(package, sources)
    for service, names in SERVICES.items():
        flat = sum(rooms.pop(name, 0) for name in names)
        rows.append(Row(name=f"flat core of the {service}, modules", value=flat, limit=MAX_FLAT_MODULES))
    largest = tuple(f"{n} {room}" for room, n in rooms.most_common(6))
    rows.append(Row(name="largest room, modules", value=max(rooms.values()), limit=MAX_ROOM_MODULES, details=largest))

    shares = {
        package.name: percent(sum(s.n_single_use for s in sources), sum(len(s.functions) for s in sources))
        for package, sources in by_package.items()
    }
    rows.append(
        Row(
            name="private helpers used once, of all functions",
            value=percent(sum(s.n_single_use for s in ours), sum(len(s.functions) for s in ours)),
            limit=MAX_SINGLE_USE_PERCENT,
            unit="%",
            details=tuple(f"{share} % {name}" for name, share in shares.items() if share),
        )
    )
    long = [
        f"{length} {source.path.relative_to(root)}:{function.lineno} {function.name}"
        for source in ours
        for function in source.functions
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]
    rows.append(Row(name=f"functions over {MAX_FUNCTION_LINES} lines", value=len(long), limit=0, details=tuple(long)))
    rows += words_of(root, ours)
    extractor = [sources for package, sources in by_package.items() if package.name in SERVICES["extractor"]]
    rows += sets_of(root, [source for sources in extractor for source in sources])
    return rows


def words_of(root: Path, ours: list[Source]) -> list[Row]:
    """Counts the prose, and comments per line of code that is not blank."""
    n_comments = sum(len(re.findall(r"^\s*#", source.text, re.MULTILINE)) for source in ours)
    n_lines = sum(len(re.findall(r"^.*\S", source.text, re.MULTILINE)) for source in ours)
    rows = [Row(name="comment lines, of all lines", value=percent(n_comments, n_lines), unit="%")]
    groups = {"packages": ours} | {name: sources_in(root / name) for name in ASIDE}
    for name, sources in groups.items():
        limits = (MAX_FREE_RELATIVES, MAX_PERSONS) if name == "packages" else (None, None)
        found = (per_thousand(FREE_RELATIVE, sources), per_thousand(PERSON, sources))
        for what, value, limit in zip(("free relatives", "persons"), found, limits, strict=True):
            rows.append(Row(name=f"{what} per 1,000 words, {name}", value=value, limit=limit))
    return rows


def sets_of(root: Path, extractor: list[Source]) -> list[Row]:
    """Counts the places outside the room of sets that know how a set is stored."""
    outside = [source for source in extractor if "sets" not in source.path.parts]
    loads = {
        str(source.path.relative_to(root)): len(MANIFEST_LOAD.findall(source.code))
        for source in outside
        if "runner" not in source.path.parts
    }
    encodings = [
        f"{name}: {', '.join(files)}"
        for name, rule in WINDOW_ENCODINGS.items()
        if (files := [source.path.name for source in outside if rule.search(source.code)])
    ]
    encodings += ["ActivationSet.kind" for source in extractor if WINDOW_KIND.search(source.code)]
    return [
        Row(
            name="loads of a manifest or index outside sets/ and runner/",
            value=sum(loads.values()),
            limit=MAX_MANIFEST_LOADS,
            details=tuple(f"{n} {path}" for path, n in loads.items() if n),
        ),
        Row(
            name="encodings of WINDOW",
            value=len(encodings),
            limit=MAX_WINDOW_ENCODINGS,
            details=tuple(encodings),
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--check", action="store_true", help="end with 1 when a number is past its limit")
    args = parser.parse_args()

    rows = measure(args.folder.resolve())
    for row in rows:
        limit = "" if row.limit is None else f"at most {row.limit:g}"
        mark = "" if row.ok else "  <- past its limit"
        sys.stdout.write(f"{row.name:56} {row.value:>8} {row.unit:1}  {limit:12}{mark}".rstrip() + "\n")
        for detail in row.details:
            sys.stdout.write(f"    {detail}\n")
    return int(args.check and not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
