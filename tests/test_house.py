"""The house rules that tools can hold: layers, dependencies, and documents that say what is there."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from onward.cli.main import main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = PROJECT["dependencies"]
EXTRAS = [
    dependency
    for extra in PROJECT["optional-dependencies"].values()
    for dependency in extra
    if not dependency.startswith("onward[")  # one extra that takes in others
]
MACHINE_PATHS = re.compile(r"(?<![\w.-])/(?:work|root|tmp/bash\w*|home/[a-z]\w*)/[\w.]")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_and_range(dependency: str) -> tuple[str, str]:
    name, bounds = re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", dependency).groups()
    return name.lower(), bounds


def tracked_text() -> dict[Path, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for path in (ROOT / name for name in listed.split("\0") if name):
        if path.is_file():
            try:
                texts[path.relative_to(ROOT)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return texts


def headings(path: Path) -> list[int]:
    """The level of each heading, code blocks aside."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", path.read_text()), re.MULTILINE)]


def test_data_flows_one_way(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_logo=True) == EXIT_STATUS_SUCCESS


def test_architecture_lists_the_layers_that_are_held():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    held = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == [set(layer) for layer in held]


def test_architecture_lists_every_module():
    """Else: .venv/bin/python docs/make_architecture_md.py"""
    spec = importlib.util.spec_from_file_location("make_architecture_md", ROOT / "docs/make_architecture_md.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = (ROOT / "docs/architecture.md").read_text()
    assert made.page(text) == text, "run .venv/bin/python docs/make_architecture_md.py"


@pytest.mark.parametrize("dependency", [*RUNTIME, *EXTRAS])
def test_dependency_is_documented_and_pinned(dependency):
    name, bounds = name_and_range(dependency)
    documented = re.findall(r"^\| ([\w.-]+) \| (\S+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    assert (name, bounds) in documented
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert name in pins


def test_no_file_speaks_of_the_machine_it_was_written_on():
    found = {
        f"{path}:{number}"
        for path, text in tracked_text().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATHS.search(line) and path != Path("tests/test_house.py")
    }
    assert not found


def test_both_readmes_have_the_same_structure():
    english, chinese = headings(ROOT / "README.md"), headings(ROOT / "README.zh-CN.md")
    assert len(english) > 3
    assert english == chinese


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_names_only_commands_that_exist(readme, capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    commands = set(re.findall(r"^    ([a-z]+)(?:  |$)", shown, re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\.venv/bin/)onward ([a-z]+)\b", (ROOT / readme).read_text(), re.MULTILINE))
    named -= {"fine"}  # "onward fine-tunes"
    assert "run" in named
    assert named <= commands


def test_every_link_between_documents_leads_somewhere():
    broken = {
        f"{path}: {target}"
        for path, text in tracked_text().items()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in target and not (ROOT / path.parent / target).exists()
    }
    assert not broken
