"""Imports what only some of the package needs, or says how to install it."""

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """An optional module.

    Arguments
    ---------
    module : str
        Its name, with dots if it is part of another.
    extra : str
        The extra of this package that brings it.
    purpose : str
        What the caller was asked to do, for the error message.

    Raises
    ------
    ImportError
        If it is not installed, naming the extra, or is and cannot be imported, with the reason.

    Example
    -------
    >>> require("parrot", "birds", "talking")
    Traceback (most recent call last):
    ...
    ImportError: talking needs parrot, which is not installed: pip install 'speechbrain_mrl[birds]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        reason = "is not installed" if absent else f"cannot be imported ({error}); install it again"
        raise ImportError(
            f"{purpose} needs {module}, which {reason}: pip install 'speechbrain_mrl[{extra}]'"
        ) from error
