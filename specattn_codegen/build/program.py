"""Program: what of a rendered Python file reaches a compiler. Comments and docstrings do not, nor what is not used."""

from __future__ import annotations

import ast
import functools


@functools.lru_cache(maxsize=8)  # every device function of a file is asked for in turn
def _statements(text: str) -> tuple[ast.stmt, ...]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tuple(tree.body)


def whole_program(text: str) -> str:
    """Of a whole file. Two of equal programs do the same, whatever their comments say."""
    return "\n".join(map(ast.dump, _statements(text)))


def function_program(text: str, function: str) -> str:
    """Of one function: its definition and, of the file, everything that it uses. Two of equal programs compile to the
    same instructions."""
    statements = _statements(text)
    reached, waiting = set[ast.stmt](), {function}
    while waiting:
        found = [one for one in statements if one not in reached and waiting & _defined(one)]
        reached.update(found)
        waiting = {node.id for one in found for node in ast.walk(one) if isinstance(node, ast.Name)}
    return "\n".join(ast.dump(one) for one in statements if one in reached)


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a statement of a file gives a meaning."""
    match statement:
        case ast.FunctionDef(name=name):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
        case _:
            stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            return {node.id for node in stored if isinstance(node.ctx, ast.Store)}
