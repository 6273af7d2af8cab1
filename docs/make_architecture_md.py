"""Write the list of modules at the end of docs/architecture.md, from each module's first sentence.

.venv/bin/python docs/make_architecture_md.py
"""

from __future__ import annotations

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
SOURCE = Path(__file__).parents[1] / "src/onward"
HEAD = "## Every module\n"
ABOUT = "Written by `docs/make_architecture_md.py` from the first sentence of each; a test compares.\n"


def page(text: str) -> str:
    """The page with its last section made anew."""
    packages = sorted({path.parent for path in SOURCE.rglob("*.py")})
    return "\n".join([text.partition(HEAD)[0] + HEAD, ABOUT, *map(_package, packages)])


def _package(directory: Path) -> str:
    name = directory.relative_to(SOURCE).as_posix().removeprefix(".")
    modules = sorted(path for path in directory.glob("*.py") if path.name != "__init__.py")
    rows = [f"- `{path.stem}`: {_first_sentence(path)}\n" for path in modules]
    about = _first_sentence(directory / "__init__.py").removeprefix("onward: ")
    return f"**{name or 'onward'}**: {about}\n\n{''.join(rows)}"


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0]
    return sentence.removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
