# SPDX-License-Identifier: MIT
"""README and docs/: the files they name exist, links and anchors resolve, commands and code blocks are valid."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.dataset import open_dataset

ROOT = Path(__file__).parents[1]
PACKAGES = ("san", "torch_utils", "metrics", "training")
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    [f for p in (*PACKAGES, "tests") for f in (ROOT / p).rglob("*.py")] + list(ROOT.glob("*.py"))
)
FOLDERS = (*PACKAGES, "docs", "tests", ".ci")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
FILE_NAME = re.compile(r"(?<![\w./<>*-])(?:[\w.*-]+/)*[\w*-][\w.*-]*\.(?:py|md|toml|npz)(?![\w/])")
FOLDER_PATH = re.compile(r"(?<![\w./<>-])\.?[A-Za-z_]+(?:/[\w.*-]+)*/[\w.*-]*")
SOURCE_ANCHOR = re.compile(r"docs/[\w-]+\.md#[\w-]+")
TEST_NAME = re.compile(r"\btest_\w+\b(?!\.py)")
EXTENSIONLESS = {"LICENSE", ".ci/run", ".gitignore"}

each_document = pytest.mark.parametrize("document", DOCS, ids=lambda file: file.relative_to(ROOT).as_posix())


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def exists(name: str) -> bool:
    """Whether a path from the root, or a bare file name anywhere in the project, or a pattern of these, exists."""
    if "/" in name:
        return any(True for _ in ROOT.glob(name.rstrip("/")))
    return any(True for _ in ROOT.glob(name)) or any(
        True for folder in FOLDERS for _ in (ROOT / folder).rglob(name)
    )


def paths_in(text: str) -> set[str]:
    """Paths and file names of the project in a code span or a line of prose: *.py, *.md, ..., and known/folder/..."""
    names = set(FILE_NAME.findall(text))
    names |= {path for path in FOLDER_PATH.findall(text) if path.partition("/")[0] in FOLDERS}
    return names


def tree_paths(block: str) -> list[str]:
    """Paths of a tree drawn by indentation: the names that begin its lines, each below the folder it stands under."""
    found, parents = [], []
    for line in block.splitlines():
        line = re.sub("[│├└─]", " ", line)
        indent = len(line) - len(line.lstrip())
        names = []
        for word in line.split():
            if not (word in EXTENSIONLESS or word.endswith("/") or re.fullmatch(r"[\w.*-]+\.\w+", word)):
                break
            names.append(word)
        if not names:
            continue
        parents = [parent for parent in parents if parent[0] < indent]
        prefix = "".join(name for _, name in parents)
        found += [prefix + name for name in names]
        if names[0].endswith("/"):
            parents.append((indent, names[0]))
    return found


def is_tree(block: str) -> bool:
    return bool(re.search(r"^\W*san/", block, re.MULTILINE))


def anchors_of(text: str) -> set[str]:
    """Anchors that GitHub gives the headings."""
    anchors: set[str] = set()
    for heading in HEADING.findall(without_fences(text)):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeats = sum(1 for anchor in anchors if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor))
        anchors.add(f"{slug}-{repeats}" if repeats else slug)
    return anchors


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for link in LINK.findall(without_fences(text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        is_whole = target.exists() and (not anchor or anchor in anchors_of(target.read_text()))
        if not is_whole:
            broken.append(link)
    return broken


def flags_of(*sources: str) -> set[str]:
    return {flag for source in sources for flag in re.findall(r"--[a-z][\w-]*", (ROOT / source).read_text())}


SCRIPT_FLAGS = {
    "train.py": flags_of("training/cli_options.py") | {"--help"},
    **{
        script: flags_of(script, "training/sampling_cli.py") | {"--help"}
        for script in ("gen_images.py", "gen_class_samplesheet.py", "gen_video.py")
    },
    "calc_metrics.py": flags_of("training/score_options.py", "training/run_comparison.py") | {"--help"},
    "dataset_tool.py": flags_of("dataset_tool.py") | {"--help"},
    **{
        script: flags_of(script) | {"--help"}
        for script in (
            "tests/benchmarks/metrics.py",
            "tests/benchmarks/ops.py",
            "tests/benchmarks/precision.py",
            "tests/benchmarks/quickstart.py",
            "tests/benchmarks/san_diagnostics.py",
            "tests/benchmarks/san_evidence.py",
        )
    },
    "training/plot.py": flags_of("training/plot.py") | {"--help"},  # run as a module
}


def unknown_flags(text: str) -> list[str]:
    """Flags, in commands that run one of our scripts, which that script does not have."""
    commands = re.findall(r"python (\S+\.py)([^`\n|&;]*)", text)
    return [
        f"{script} {flag}"
        for script, arguments in commands
        for flag in re.findall(r"--[a-z][\w-]*", arguments)
        if flag not in SCRIPT_FLAGS.get(script, set())
    ]


def test_the_documents_are_there():
    names = {file.relative_to(ROOT).as_posix() for file in DOCS}
    assert {
        "README.md",
        *(
            f"docs/{name}.md"
            for name in (
                "architecture",
                "checkpoints",
                "evidence",
                "fidelity",
                "finetune",
                "metrics",
                "plugin",
                "reproduce",
                "san",
                "training",
            )
        ),
    } <= names


@each_document
def test_files_that_are_named_exist(document: Path):
    spans = CODE_SPAN.findall(without_fences(document.read_text()))
    missing = sorted({path for span in spans for path in paths_in(span) if not exists(path)})
    assert not missing, f"{document.name} names files that are not there: {missing}"


@each_document
def test_trees_show_what_is_there(document: Path):
    for _, block in FENCE.findall(document.read_text()):
        if is_tree(block):
            missing = [path for path in tree_paths(block) if not (ROOT / path).exists()]
            missing += [name for name in FILE_NAME.findall(block) if not exists(name)]
            assert not missing, f"{document.name}: its tree shows {missing}"


def test_readme_has_a_tree():
    assert any(is_tree(block) for _, block in FENCE.findall((ROOT / "README.md").read_text()))


def test_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [f.relative_to(ROOT).as_posix() for p in PACKAGES for f in (ROOT / p).rglob("*.py")]
    missing = [module for module in modules if not module.endswith("__init__.py") and module not in text]
    assert not missing, f"docs/architecture.md says nothing about {missing}: add a clause for each"


@each_document
def test_links_resolve(document: Path):
    assert not broken_links(document, document.read_text())


def test_anchors_named_in_the_code_exist():
    named = {(f.name, anchor) for f in SOURCES for anchor in SOURCE_ANCHOR.findall(f.read_text())}
    assert len(named) >= 3
    broken = [
        f"{file}: {anchor}"
        for file, anchor in sorted(named)
        if broken_links(ROOT / "README.md", f"[]({anchor})")
    ]
    assert not broken


@each_document
def test_tests_that_are_named_exist(document: Path):
    defined = {
        name
        for f in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", f.read_text())
    }
    spans = CODE_SPAN.findall(without_fences(document.read_text()))
    assert not {name for span in spans for name in TEST_NAME.findall(span)} - defined


@each_document
def test_python_blocks_parse(document: Path):
    for language, block in FENCE.findall(document.read_text()):
        if language in ("python", "py", "doctest", "pycon"):
            examples = doctest.DocTestParser().get_examples(block)
            for source in [example.source for example in examples] or [block]:
                ast.parse(source)


@each_document
def test_commands_use_flags_that_exist(document: Path):
    assert not unknown_flags(document.read_text())


def test_flags_in_the_training_guide_exist():
    spans = CODE_SPAN.findall(without_fences((ROOT / "docs" / "training.md").read_text()))
    known = set().union(*SCRIPT_FLAGS.values())
    assert not {flag for span in spans for flag in re.findall(r"^--[a-z][\w-]*", span)} - known


def test_data_set_example_makes_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The guide's command, on a small folder of photographs."""
    for name, size in (("cat/a.png", (90, 70)), ("cat/b.png", (64, 64)), ("dog/a.png", (10, 31))):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*size, 4), np.uint8)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    commands = (ROOT / "docs" / "training.md").read_text().splitlines()
    command = next(line for line in commands if line.startswith("python dataset_tool.py --source photos"))
    subprocess.run([sys.executable, ROOT / "dataset_tool.py", *shlex.split(command)[2:]], check=True)
    dataset = open_dataset("photos.zip", use_labels=True)
    assert (len(dataset), dataset.resolution, dataset.c_dim) == (3, 64, 2)
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.class_names == ("cat", "dog")


def test_the_checks_can_fail(tmp_path: Path):
    assert paths_in("see training/nothing.py, tests/data/d_x_*.npz and setup.py") == {
        "training/nothing.py",
        "tests/data/d_x_*.npz",
        "setup.py",
    }
    assert paths_in("training/generator/ and runs/00000-x/log.txt") == {"training/generator/"}
    assert exists("training/config.py") and exists("config.py") and exists("tests/data/d_*.npz")
    assert not exists("training/nothing.py") and not exists("nothing.py") and not exists("tests/data/q_*.npz")
    tree = "train.py LICENSE   text\nsan/   the plugin\n  a.py b.py   two\n  c/\n    d.py\ndocs/  texts, and more\n"
    assert tree_paths(tree) == [
        "train.py",
        "LICENSE",
        "san/",
        "san/a.py",
        "san/b.py",
        "san/c/",
        "san/c/d.py",
        "docs/",
    ]
    assert is_tree(tree) and not is_tree("python train.py\n")
    text = "# One `two`, three\n## A-b\n## A-b\n```\n# no heading\n```\n[x](#a-b-1) [y](#none) [z](gone.md)\n"
    assert anchors_of(text) == {"one-two-three", "a-b", "a-b-1"}
    document = tmp_path / "d.md"
    document.write_text(text)
    assert broken_links(document, text) == ["#none", "gone.md"]
    assert unknown_flags("python train.py --cond 1 --nothing 2 && x --other") == ["train.py --nothing"]
