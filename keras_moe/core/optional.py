"""Imports of optional packages, with errors that say what to install."""

from importlib import import_module
from typing import Any


def import_of_extra(extra: str, user: str, module: str) -> Any:
    """Imports a module of an optional package.

    Args:
        extra: the extra in pyproject.toml that installs the package.
        user: who needs it, in the words of the message.
        module: the module's full name.

    Raises:
        ImportError: where the package, or something that it imports, is missing or broken.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        say = f"{user} needs `{package}`"
        if missing == package:
            say += f': install keras_moe with its extra "{extra}", '
            say += f'in a clone `pip install ".[{extra}]"`'
        else:
            say += f", which is installed; `{missing}`, which it imports, is not"
        raise ImportError(say, name=error.name) from error
    except ImportError as error:
        raise ImportError(
            f"{user} needs `{package}`, which is installed but cannot be imported: {error}",
            name=error.name,
        ) from error
