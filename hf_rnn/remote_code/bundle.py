"""A checkpoint's classes as one file that needs torch and transformers alone.

The file is made from the package's sources: every definition that the classes reach, in the order in which modules
import each other, comments and docstrings included. An op's functions, operators among them, are replaced by those of
the same names in its `reference.py`, and what has none there by that in `hf_rnn.remote_code.portable`. What two modules
call alike gets its module's name in front.
"""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hf_rnn._version import __version__
from hf_rnn.remote_code.loader import FILE_NAME

if TYPE_CHECKING:
    from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig

PORTABLE = "hf_rnn.remote_code.portable"
# Methods for which one has the package: other formats of weights, and the way to the Hub
LEFT_OUT = {"from_torch", "to_torch", "_gate_major", "from_xlstm", "get_config_dict"}
LEFT_OUT |= {"write_code", "_upload_modified_files"}
# And what makes a token one compiled call
LEFT_OUT |= {"fuse", "fuse_cell", "fuse_logits", "fuse_recurrence", "decoding"}
LEFT_OUT |= {"resize_token_embeddings", "generate_batch"}

_HEADER = '''# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""{stem} in one file: what `trust_remote_code=True` needs beside torch and transformers.

Made from the sources of hf-rnn {version} by `hf-rnn bundle`; do not edit. Recurrences are loops over time here: after
`pip install hf-rnn` and `import hf_rnn` the same checkpoint gives the same outputs by compiled kernels.
"""
'''


class Definition(NamedTuple):
    """A function, class or constant at the top of a module."""

    module: str
    name: str


class Imported(NamedTuple):
    """A name from outside the package: `from module import name`, or `import module` where name is empty."""

    module: str
    name: str


class Source:
    """A module of the package, read but not run."""

    def __init__(self, module: str):
        self.module = module
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text()
        self.lines = text.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.parse(text).body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    self.definitions[target.id] = node
        elif isinstance(node, ast.Import):
            self.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            self.imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}


source = functools.cache(Source)


def resolve(module: str, name: str) -> Definition | Imported | str | None:
    """What a name means in a module: a definition, something imported from outside, a module of the package by its
    full name, or (None) something local or builtin."""
    if name in source(module).definitions:
        return portable(Definition(module, name))
    if name not in source(module).imports:
        return None
    target, original = source(module).imports[name]
    if not target.startswith("hf_rnn"):
        return Imported(target, original)
    if target != module and (found := resolve(target, original)) is not None:
        return found  # as for Python, before a submodule of that name
    is_module = importlib.util.find_spec(f"{target}.{original}") if is_package(target) else None
    return f"{target}.{original}" if is_module else None


def is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def portable(definition: Definition) -> Definition:
    """What takes a definition's place where there are no kernels: another one, or itself."""
    module, name = definition
    if name in ("write_remote_code", "decode_fused", "packed_from_coded", "packed_room") or (
        module.startswith("hf_rnn_kernels") and name in source(PORTABLE).definitions
    ):
        return Definition(PORTABLE, name)
    if module.startswith("hf_rnn_kernels.") and is_package(package := module.removesuffix(".op")):
        reference = f"{package}.reference"
        if importlib.util.find_spec(reference) and name in source(reference).definitions:
            return Definition(reference, name)
    return definition


def references(definition: Definition) -> Iterator[tuple[ast.expr, Definition | Imported]]:
    """The expressions in a definition that mean something at the top of a module, with what they mean."""
    nodes = [source(definition.module).definitions[definition.name]]
    while nodes:
        node = nodes.pop()
        meaning: Definition | Imported | str | None = None
        if isinstance(node, ast.Name):
            meaning = resolve(definition.module, node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            inside = resolve(definition.module, node.value.id)
            meaning = resolve(inside, node.attr) if isinstance(inside, str) else None
        if isinstance(node, ast.expr) and isinstance(meaning, Definition | Imported):
            yield node, meaning
        else:
            nodes += [child for child in ast.iter_child_nodes(node) if not _left_out(child)]  # type: ignore[misc]


def _left_out(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in LEFT_OUT


def reachable(roots: list[Definition]) -> tuple[dict[str, list[Definition]], set[Imported]]:
    """Definitions by module, a module after those it uses, in the order of the source; and imports from outside."""
    found: dict[str, set[Definition]] = {}
    imported: set[Imported] = set()
    uses: dict[str, set[str]] = {}
    waiting = list(roots)
    while waiting:
        definition = waiting.pop()
        if definition in found.setdefault(definition.module, set()):
            continue
        found[definition.module].add(definition)
        for _, meaning in references(definition):
            if isinstance(meaning, Imported):
                imported.add(meaning)
            else:
                waiting.append(meaning)
                uses.setdefault(definition.module, set()).add(meaning.module)
    ordered: dict[str, list[Definition]] = {}

    def visit(module: str) -> None:
        for used in sorted(uses.get(module, set()) - {module}):
            if used not in ordered:
                visit(used)
        ordered[module] = sorted(found[module], key=lambda d: source(module).definitions[d.name].lineno)

    for root in roots:
        if root.module not in ordered:
            visit(root.module)
    return ordered, imported


def final_names(definitions: list[Definition]) -> dict[Definition, str]:
    """Their own names, and for those of kernels that several modules have, such as `scan`, `_mlstm_scan`."""
    names = [definition.name for definition in definitions]
    final = {}
    for d in definitions:
        folder = d.module.split(".")[1].removesuffix("_scan") if d.module.startswith("hf_rnn_kernels.") else ""
        final[d] = f"_{folder}_{d.name.lstrip('_')}" if folder and names.count(d.name) > 1 else d.name
    assert len(set(final.values())) == len(final), "two definitions of one name"
    return final


def text_of(definition: Definition, final: dict[Definition, str]) -> str:
    """A definition's source with the comments above it, without methods left out, under its final names."""
    module = source(definition.module)
    node = module.definitions[definition.name]
    lines = [line.encode() for line in module.lines]  # ast counts bytes
    edits = [(n, final[d]) for n, d in references(definition) if isinstance(d, Definition)]
    for expression, name in sorted(edits, key=lambda edit: (edit[0].lineno, -edit[0].col_offset)):
        at = expression.lineno - 1
        assert expression.end_lineno == expression.lineno and expression.end_col_offset is not None
        lines[at] = lines[at][: expression.col_offset] + name.encode() + lines[at][expression.end_col_offset :]
    if isinstance(node, ast.FunctionDef):
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(
            f"def {node.name}(".encode(), f"def {final[definition]}(".encode()
        )
    dropped = set()
    for method in getattr(node, "body", []):
        if _left_out(method):
            first = _first_line(method, lines)
            while not lines[first - 1].strip():
                first -= 1
            dropped |= set(range(first, method.end_lineno))
    kept = range(_first_line(node, lines), node.end_lineno or node.lineno)
    text = "\n".join(lines[n].decode() for n in kept if n not in dropped)
    return re.sub(r"  # (type: ignore(\[[\w, -]*\])?|fmt: skip|noqa\S*)(  (?=#))?", "", text)


def _first_line(node: ast.stmt, lines: list[bytes]) -> int:
    """Index of the first line of a statement, decorators and comments above included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].lstrip().startswith(b"#"):
        first -= 1
    return first


def import_lines(imported: set[Imported], aliases: dict[Imported, str]) -> str:
    """Import statements in the usual order: the standard library's first, whole modules before names."""
    groups: list[list[str]] = [[], []]
    for module in sorted({x.module for x in imported}):
        group = groups[module.split(".")[0] not in sys.stdlib_module_names]
        names = {x.name: aliases[x] for x in imported if x.module == module}
        if "" in names:
            del names[""]
            group.append(f"import {module}")
        ordered = sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
        if plain := [name for name in ordered if names[name] == name]:
            line = f"from {module} import {', '.join(plain)}"
            wrapped = "".join(f"    {name},\n" for name in plain)
            group.append(line if len(line) <= 120 else f"from {module} import (\n{wrapped})")
        group += [f"from {module} import {name} as {names[name]}" for name in ordered if names[name] != name]
    ordered_groups = [sorted(group, key=lambda line: line.startswith("from")) for group in groups]
    return "\n\n".join("\n".join(group) for group in ordered_groups if group)


def bundle_source(config_class: "type[RecurrentConfig]") -> str:
    """The text of `modeling_hf_rnn.py` for an architecture: its config and its model classes."""
    module = config_class.__module__
    models = module.replace(".configuration_", ".modeling_")
    names = list(config_class.auto_classes().values())
    roots = [Definition(module, config_class.__name__), *(Definition(models, name) for name in names)]
    ordered, imported = reachable(roots)
    final = final_names([definition for definitions in ordered.values() for definition in definitions])
    aliases = {
        Imported(*target): name for module in ordered for name, target in source(module).imports.items()
    }  # what modules call the same thing, they call alike
    header = _HEADER.format(stem=config_class.__name__.removesuffix("Config"), version=__version__)
    parts = [header, import_lines(imported, aliases)]
    for module, definitions in ordered.items():
        text, last = "\n" * (1 + (len(parts) > 2)) + f"# From {module.replace('.', '/')}.py", ast.Assign
        for definition in definitions:
            kind = type(source(module).definitions[definition.name])
            text += ("\n" if kind is last is ast.Assign else "\n\n\n") + text_of(definition, final)
            last = kind  # type: ignore[assignment]
        parts.append(text)
    exported = "".join(f'    "{name}",\n' for name in sorted([config_class.__name__, *names]))
    parts.append(f"\n\n__all__ = [\n{exported}]\n")
    return "\n".join(parts)


def write_bundle(config_class: "type[RecurrentConfig]", folder: str | Path) -> Path:
    """Write an architecture's `modeling_hf_rnn.py`; returns where."""
    target = Path(folder) / FILE_NAME
    target.write_text(bundle_source(config_class))
    return target
