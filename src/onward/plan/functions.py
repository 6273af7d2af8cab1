"""Functions of the user's that a plan names as `module:function`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from onward.errors import PlanError
from onward.files import digest_bytes, digest_file


@cache
def find_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; looked for in the current directory too. Else PlanError."""
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        places = f"modules are looked for in {Path.cwd()} and among what is installed"
        hint = places if function_name else "write it as module:function"
        raise PlanError(f"{name} is not found ({error})", hint=hint) from None
    except Exception as error:  # whatever a module of the user's raises
        raise PlanError(f"{module_name} cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(function):
        raise PlanError(f"{name} is not a function")
    return function  # type: ignore[no-any-return]


def require_arguments(name: str, *words: str) -> None:
    """PlanError unless the function can be called with so many arguments; `words` are what they are."""
    try:
        inspect.signature(find_function(name)).bind(*words)
    except TypeError as error:
        raise PlanError(f"{name} is to be called with ({', '.join(words)}): {error}") from None
    except ValueError:  # one written in C tells nothing of itself
        return


def source_digest(name: str) -> str:
    """The digest of the file that the function is written in, as far as it has one: what it imports does not count."""
    try:
        return digest_file(Path(inspect.getfile(inspect.unwrap(find_function(name)))))
    except (TypeError, OSError):
        return digest_bytes(name.encode())
