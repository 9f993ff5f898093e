"""Files and functions that can be read at a glance, and nothing else at the top."""

import ast
import io
import pathlib
import re
import subprocess
import tokenize
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CODE = ("loro_jax", "models", "configs")
FILES = sorted(path for folder in (*CODE, "tests") for path in (ROOT / folder).rglob("*.py"))

MOST_LINES = 500
MOST_CODE_LINES = 60
MOST_ARGUMENTS = 13

# What stands at the top beside files whose names begin with a dot.
TOP = {
    *("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"),
    *("train.py", "configs", "loro_jax", "models", "tests"),
}

# Files that are being taken apart.
UNDER_WORK = {
    "loro_jax/peers/adarankgrad.py",
    "loro_jax/training/config.py",
    "loro_jax/training/step.py",
}

# Tokens that make no line one of code.
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def functions(source):
    """(qualified name, node) of all functions and methods, nested ones among them."""

    def within(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from within(child, f"{prefix}{child.name}." if named else prefix)

    return list(within(ast.parse(source), ""))


def lines_of_code(source):
    """Numbers of the lines that hold anything but comments."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def lengths(source):
    """Lines of code of each function, by its qualified name."""
    code = lines_of_code(source)
    found = {}
    for name, node in functions(source):
        lines = code & set(range(node.lineno, node.end_lineno + 1))
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
                ast.get_docstring(part) is not None
            ):
                docs = part.body[0]
                lines -= set(range(docs.lineno, docs.end_lineno + 1))
        found[name] = len(lines)
    return found


def arguments(source):
    """Arguments of each public function or method (without ``self``), by its qualified name."""
    found = {}
    for name, node in functions(source):
        if any(part.startswith("_") for part in name.split(".")):
            continue
        given = node.args
        names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        found[name] = len(names) - (names[:1] in (["self"], ["cls"]))
    return found


EXAMPLE = '''
def outer(a, b, *, c):
    """Says something.

    In many lines.
    """

    # A comment.
    def inner():
        """Says more."""
        return """two
lines"""

    return inner  # and a comment


class Thing:
    def method(self, a):
        return a
'''


def test_lines_of_code_are_counted_without_docstrings_comments_and_blanks():
    assert lengths(EXAMPLE) == {"outer": 5, "outer.inner": 3, "Thing.method": 2}
    assert arguments(EXAMPLE) == {"outer": 3, "outer.inner": 0, "Thing.method": 1}


def test_no_file_is_long():
    lines = {str(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("measure", "most"), [(lengths, MOST_CODE_LINES), (arguments, MOST_ARGUMENTS)]
)
def test_functions_are_read_at_a_glance(measure, most):
    places = [ROOT / "train.py", *(path for path in FILES if "tests" not in path.parts)]
    found = {
        f"{path.relative_to(ROOT)}: {name}": count
        for path in places
        for name, count in measure(path.read_text(encoding="utf-8")).items()
    }
    assert len(found) > 500
    long = {name: count for name, count in found.items() if count > most}
    assert {name for name in long if name.split(":")[0] not in UNDER_WORK} == set()


def test_nothing_else_stands_at_the_top():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP


def test_every_module_has_its_place_in_the_order_of_imports():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    placed = set(re.findall(r"loro_jax\.\w+", " ".join(layers)))
    files = (ROOT / "loro_jax").glob("*.py")
    packages = (ROOT / "loro_jax").glob("*/__init__.py")
    modules = {path.stem for path in files} | {path.parent.name for path in packages}
    assert {f"loro_jax.{name}" for name in modules - {"__init__", "_version"}} - placed == set()
