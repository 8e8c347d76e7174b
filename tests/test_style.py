# SPDX-License-Identifier: MIT
"""House rules that a linter does not know: sizes, names, licence lines, commented configuration fields."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("san", "torch_utils", "metrics", "training")
MAX_FILE_LINES = 400  # the goal is 300
MAX_FUNCTION_LINES = 60  # the goal is 40
MAX_PARSER_LINES = 80  # constructors, and functions in scripts and cli.py
VAGUE_NAMES = {"utils", "util", "misc", "common", "helpers"}
WORKPLACE = re.compile(r"(?<![\w.])/wo" + r"rk/|\.\./sha" + r"red|sha" + r"red/(spec|golden|STYLE|DESIGN)")

PRODUCT_FILES = sorted([f for p in PACKAGES for f in (ROOT / p).rglob("*.py")] + list(ROOT.glob("*.py")))
PYTHON_FILES = sorted([*PRODUCT_FILES, *(ROOT / "tests").rglob("*.py")])
TEXT_FILES = sorted(
    [
        *PYTHON_FILES,
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob(".ci/*"),
    ]
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


product = pytest.mark.parametrize("file", PRODUCT_FILES, ids=name_of)
python = pytest.mark.parametrize("file", PYTHON_FILES, ids=name_of)


def long_functions(text: str, is_script: bool) -> list[str]:
    """Functions over their limit, as "name (lines)"; decorators do not count."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_PARSER_LINES if is_script or node.name == "__init__" else MAX_FUNCTION_LINES
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > limit:
                found.append(f"{node.name} ({num_lines})")
    return found


def uncommented_fields(text: str) -> list[str]:
    """Fields of dataclasses without a comment on one of their own lines."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    commented_lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    lines = set(range(field.lineno, field.end_lineno + 1))
                    if not lines & commented_lines:
                        found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


@python
def test_file_is_short(file: Path):
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES


@product
def test_functions_are_short(file: Path):
    is_script = file.parent == ROOT or file.name == "cli.py"
    assert not long_functions(file.read_text(), is_script)


@product
def test_module_name_says_something(file: Path):
    assert file.stem not in VAGUE_NAMES


@python
def test_licence_line(file: Path):
    text = file.read_text()
    assert not text or text.startswith("# SPDX-License-Identifier: MIT\n")


@product
def test_module_docstring(file: Path):
    text = file.read_text()
    assert not text or ast.get_docstring(ast.parse(text))


def test_config_fields_are_commented():
    assert not uncommented_fields((ROOT / "training" / "config.py").read_text())


@pytest.mark.parametrize("file", TEXT_FILES, ids=name_of)
def test_no_path_of_somebodys_machine(file: Path):
    found = [line for line in file.read_text().splitlines() if WORKPLACE.search(line)]
    assert not found


def test_the_checks_can_fail():
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(function, is_script=False) == [f"f ({MAX_FUNCTION_LINES + 1})"]
    assert not long_functions(function, is_script=True)
    fields = "@dataclass(frozen=True)\nclass C:\n    a: int  # pixels\n    b: int = 2\n"
    assert uncommented_fields(fields) == ["C.b"]
    assert WORKPLACE.search("see /wo" + "rk/notes")
    assert not WORKPLACE.search("a/wo" + "rk/b.md")
