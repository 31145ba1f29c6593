#!/usr/bin/env python3
"""Checks what no linter knows about the style of zs3.py and zs3_dist.py.

    python tools/style.py [--stats] [FILE ...]

Prints `file:line: message` for each finding and exits 1 if there are any. The files are taken
together: what one defines, another may use. --stats adds their sizes. What it relies on:

- A banner is a comment line with a number and a name, `# ==== 7 Storage ====`: any run of two or
  more = or -, which may be left out at the end. A description may follow in brackets.
- The map is the paragraph of the module docstring whose first entry is number 1. Entries begin
  lines, or stand between ` - `, ` · ` or two blanks. These end a name; so do `: ` and a bracket.
  A name begins with a capital.
- The error codes are the one-word strings in ERRORS.
- What only tests use is not used. ALLOWED names the exceptions, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeGuard

MAX_FUNCTION_LINES = 50
MAX_LINE_CHARACTERS = 100

# A module-level name, or Class.method -> why nothing in the modules needs to use it.
ALLOWED: dict[str, str] = {"main": "the entry point, which the last lines name in a string"}

PLAIN_BASES = {"Exception", "Generic", "NamedTuple", "Protocol", "object"}  # call no other methods

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    path: str
    line: int
    message: str


class Section(NamedTuple):
    number: int
    name: str
    line: int


class Module:
    """A parsed file: `comments` by line, `sections` as its banners say, `definitions` by name, and
    `origins`: what `from module import name` binds, as (module, name)."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.name, self.lines = path, Path(path).stem, text.splitlines()
        self.tree = ast.parse(text, path)
        self.nodes = list(ast.walk(self.tree))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        self.sections: list[Section] = []
        for line, comment in self.comments.items():
            banner = re.fullmatch(r"#+\s*[=-]{2,}\s*(\d+)[.:]?\s+(.*?)[\s=-]*", comment)
            if banner and self.lines[line - 1].startswith("#"):
                self.sections.append(Section(int(banner[1]), plain_name(banner[2]), line))
        self.definitions = {name: node for node in self.tree.body for name in defined_names(node)}
        self.origins = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def finding(self, line: int, message: str) -> Finding:
        return Finding(self.path, line, message)

    def functions(self) -> list[Function]:
        return [node for node in self.nodes if isinstance(node, Function)]

    def classes(self) -> list[ast.ClassDef]:
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]

    def why(self, first: int, last: int) -> bool:
        """Whether these lines, both included, hold a comment that is for people."""
        comments = [self.comments.get(line, "") for line in range(first, last + 1)]
        return any(re.match(r"#+\s*(?!noqa|type:|pragma)\w", comment) for comment in comments)


def plain_name(text: str) -> str:
    """A section's name without the description that may follow it."""
    return re.split(r"\s{2,}|\s+\(|\s+-\s|:\s", text)[0].rstrip(" .,;:")


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a module's statement defines, but those that Python reads (`__all__`)."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    names = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [n.id for n in names if isinstance(n.ctx, ast.Store) and not is_dunder(n.id)]


def is_defined(node: ast.stmt) -> TypeGuard[Function | ast.ClassDef]:
    return isinstance(node, Function | ast.ClassDef)


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def dotted(node: ast.expr) -> list[str]:
    """["a", "b"] of `a.b`, `a.b(...)` and `a.b[...]`."""
    return re.split(r"[\[(]", ast.unparse(node), maxsplit=1)[0].split(".")


def base_names(cls: ast.ClassDef) -> set[str]:
    return {dotted(base)[-1] for base in cls.bases}


def length(node: Function) -> int:
    """Lines, the docstring's too, without decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


# ---- 1 Sections ----------------------------------------------------------------------------------


def check_sections(modules: list[Module]) -> Iterator[Finding]:
    """The section map in the docstring and the banners agree in number, order and name."""
    for module in modules:
        entries = map_entries(ast.get_docstring(module.tree) or "")
        if not entries:
            yield module.finding(1, "the module docstring has no numbered section map")
        for due, section in enumerate(module.sections, 1):
            banner = f"banner {section.number} {section.name}"
            if section.number != due:
                yield module.finding(section.line, f"{banner} stands where {due} is due")
            if entries and (section.number, section.name) not in entries:
                yield module.finding(section.line, f"{banner} is not in the section map")
        banners = {(section.number, section.name) for section in module.sections}
        for due, (number, name) in enumerate(entries, 1):
            if number != due:
                yield module.finding(1, f"map entry {number} {name} stands where {due} is due")
            if (number, name) not in banners:
                yield module.finding(1, f"map entry {number} {name} has no banner")


def map_entries(docstring: str) -> list[tuple[int, str]]:
    """(number, name) of each entry of the section map; empty when there is none."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        tight = re.sub(r"(?m)^(\s*\d+[.:]?)\s+", r"\1 ", paragraph)
        pieces = re.split(r"\n\s*|\s{2,}|\s+[-·|]\s+|:\s", tight.strip())
        found = [re.match(r"(\d{1,2})[.:]?\s+([A-Z].*)", piece) for piece in pieces]
        entries = [(int(entry[1]), plain_name(entry[2])) for entry in found if entry]
        if entries and entries[0][0] == 1:
            return entries
    return []


# ---- 2 Names -------------------------------------------------------------------------------------


class Uses:
    """The `names`, as (module, name), and the `attributes` that code refers to.

    Only what is reached counts, beginning with the statements that run at import; a definition is
    one of them when a decorator of its own module registers it. `zs3.name` and
    `from zs3 import name` reach into another module.
    """

    def __init__(self, modules: list[Module]) -> None:
        self.modules = {module.name: module for module in modules}
        self.names: set[tuple[str, str]] = set()
        for module in modules:
            for node in module.tree.body:
                names = defined_names(node)
                if not names:
                    self._follow(module, node)
                for name in ALLOWED.keys() & names:
                    self._reach(module.name, name)
                for decorator in getattr(node, "decorator_list", []):
                    if dotted(decorator)[0] in module.definitions:
                        self._reach(module.name, defined_names(node)[0])
        nodes = [node for module in modules for node in module.nodes]
        self.attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}

    def _follow(self, module: Module, node: ast.AST) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                self._reach(*module.origins.get(inner.id, (module.name, inner.id)))
            elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                self._reach(inner.value.id, inner.attr)

    def _reach(self, module_name: str, name: str) -> None:
        module = self.modules.get(module_name)
        if module and name in module.definitions and (module_name, name) not in self.names:
            self.names.add((module_name, name))
            self._follow(module, module.definitions[name])


def check_names(modules: list[Module]) -> Iterator[Finding]:
    """Every constant of a section "Limits" is read, every module-level name and method is used."""
    uses = Uses(modules)
    own_classes = {cls.name for module in modules for cls in module.classes()}
    for module in modules:
        limits = limit_names(module)
        for name, node in module.definitions.items():
            if (module.name, name) not in uses.names:
                what = f"limit {name} is never read" if name in limits else f"{name} is never used"
                yield module.finding(node.lineno, what)
        for cls in module.classes():
            if not base_names(cls) <= own_classes | PLAIN_BASES:
                continue  # a base from elsewhere may call any method
            for method in [node for node in cls.body if isinstance(node, Function)]:
                name = f"{cls.name}.{method.name}"
                if not (
                    method.name in uses.attributes or is_dunder(method.name) or name in ALLOWED
                ):
                    yield module.finding(method.lineno, f"{name} is never used")


def limit_names(module: Module) -> set[str]:
    end = Section(0, "", len(module.lines) + 1)
    spans = [(a.line, b.line) for a, b in pairwise([*module.sections, end]) if a.name == "Limits"]
    return {
        name
        for name, node in module.definitions.items()
        if any(first < node.lineno < last for first, last in spans)
    }


# ---- 3 Exceptions and error codes ----------------------------------------------------------------


def check_exceptions(modules: list[Module]) -> Iterator[Finding]:
    """No bare except; a dropped exception is a particular one, and a comment says why."""
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    yield module.finding(node.lineno, "bare except")
                caught = [node.type] if node.type and all(map(is_silent, node.body)) else []
                why = module.why(node.lineno, node.end_lineno or node.lineno)
            elif isinstance(node, ast.Call) and dotted(node.func)[-1] == "suppress":
                caught = node.args
                above = module.lines[node.lineno - 2].lstrip().startswith("#")
                why = module.why(node.lineno - above, node.end_lineno or node.lineno)
            else:
                continue
            names = {
                dotted(inner)[-1] for outer in caught for inner in getattr(outer, "elts", [outer])
            }
            if {"Exception", "BaseException"} & names:
                yield module.finding(node.lineno, "drops exceptions of any kind")
            elif names and not why:
                yield module.finding(node.lineno, "drops an exception, and no comment says why")


def is_silent(node: ast.stmt) -> bool:
    """Whether a statement of a handler does nothing about the exception. `return None` does."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Return):
        return node.value is None
    return isinstance(node, ast.Pass | ast.Continue | ast.Break)


def check_error_codes(modules: list[Module]) -> Iterator[Finding]:
    """Every code in ERRORS is used, and every code given to S3Error is in ERRORS."""
    tables = [m.definitions["ERRORS"] for m in modules if "ERRORS" in m.definitions]
    in_tables = {id(inner) for table in tables for inner in ast.walk(table)}
    codes: dict[str, Finding] = {}
    used: set[str] = set()
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in in_tables:
                    used.add(node.value)
                elif re.fullmatch(r"[A-Z]\w+", node.value):
                    codes[node.value] = module.finding(node.lineno, f"{node.value} is never raised")
    yield from [finding for code, finding in codes.items() if code not in used]
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.Call) and dotted(node.func)[-1] == "S3Error" and node.args:
                for code in set(literals(node.args[0])) - codes.keys():
                    yield module.finding(node.lineno, f"{code} is not in ERRORS")


def literals(node: ast.expr) -> list[str]:
    """The strings that an expression may be, as far as they stand in it."""
    if isinstance(node, ast.IfExp):
        return literals(node.body) + literals(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


# ---- 4 Sizes and docstrings ----------------------------------------------------------------------


def check_sizes(modules: list[Module]) -> Iterator[Finding]:
    """No function over MAX_FUNCTION_LINES, no line over MAX_LINE_CHARACTERS."""
    for module in modules:
        for node in module.functions():
            if length(node) > MAX_FUNCTION_LINES:
                yield module.finding(node.lineno, f"{node.name} has {length(node)} lines")
        for number, line in enumerate(module.lines, 1):
            if len(line) > MAX_LINE_CHARACTERS:
                yield module.finding(number, f"line of {len(line)} characters")


def check_docstrings(modules: list[Module]) -> Iterator[Finding]:
    """What is public says what it means; a method may leave that to its base class or Protocol."""
    contracts: dict[str, set[str]] = {"Protocol": set()}  # class -> methods that it documents
    for cls in [cls for module in modules for cls in module.classes()]:
        methods = {node.name for node in cls.body if is_defined(node) and ast.get_docstring(node)}
        contracts[cls.name] = methods
        if "Protocol" in base_names(cls):
            contracts["Protocol"] |= methods
    for module in modules:
        for parent, node in public(module.tree):
            bases = ["Protocol", *base_names(parent)] if isinstance(parent, ast.ClassDef) else []
            inherited = any(node.name in contracts.get(base, ()) for base in bases)
            repeated = {dotted(each)[-1] for each in node.decorator_list} & {"overload", "setter"}
            if not (ast.get_docstring(node) or inherited or repeated):
                yield module.finding(node.lineno, f"{node.name} has no docstring")


def public(
    parent: ast.Module | ast.ClassDef,
) -> Iterator[tuple[ast.Module | ast.ClassDef, Function | ast.ClassDef]]:
    """Each public definition and its parent; `__init__` and one-line `__str__` etc. are not."""
    for node in parent.body:
        if is_defined(node):
            special = is_dunder(node.name) and node.name != "__init__" and len(node.body) > 1
            if special or not node.name.startswith("_"):
                yield parent, node
                if isinstance(node, ast.ClassDef):
                    yield from public(node)


# ---- 5 Command line ------------------------------------------------------------------------------

CHECKS = (
    check_sections,
    check_names,
    check_exceptions,
    check_error_codes,
    check_sizes,
    check_docstrings,
)


def findings(modules: list[Module]) -> list[Finding]:
    return sorted({finding for check in CHECKS for finding in check(modules)})


def stats(module: Module) -> str:
    functions = sorted(module.functions(), key=length)
    sizes = [length(node) for node in functions] or [0]
    longest = ", ".join(f"{node.name} {length(node)}" for node in functions[:-6:-1])
    nine_in_ten = sizes[(len(sizes) * 9 - 1) // 10]
    return (
        f"{module.path}: {len(module.lines)} lines, {len(functions)} functions, median "
        f"{statistics.median(sizes):g}, nine in ten within {nine_in_ten}, longest: {longest}"
    )


def main() -> int:
    rules = "\n".join(f"  {check.__doc__}" for check in CHECKS)
    parser = argparse.ArgumentParser(
        description="Checks the style of zs3.py and zs3_dist.py.",
        epilog="checks:\n" + rules,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", nargs="*", help="default: both, as far as present")
    parser.add_argument("--stats", action="store_true", help="print sizes too")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    present = [path for path in (root / "zs3.py", root / "zs3_dist.py") if path.exists()]
    files = arguments.files or [os.path.relpath(path) for path in present]
    modules = [Module(path, Path(path).read_text(encoding="utf-8")) for path in files]
    if not modules:
        parser.error("neither zs3.py nor zs3_dist.py is there")
    found = findings(modules)
    for finding in found:
        print(f"{finding.path}:{finding.line}: {finding.message}")
    for module in modules if arguments.stats else []:
        print(stats(module))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
