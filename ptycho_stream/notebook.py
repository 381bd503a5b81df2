"""A place in a Jupyter notebook whose picture is replaced by newer ones.

Used by ``ResultStream.show`` and its asyncio twin; IPython, which every notebook has, is imported
only there.
"""

from __future__ import annotations

import importlib
from typing import Any

from ptycho_stream.errors import MissingPackage


class LivePlace:
    """Shows the newest of the values that it is called with.

    Raises:
        MissingPackage: IPython is not installed.
    """

    def __init__(self) -> None:
        try:
            library: Any = importlib.import_module("IPython.display")
        except ModuleNotFoundError as error:
            raise MissingPackage("a live picture", "notebook", error) from error
        self._handle = library.DisplayHandle()
        self._shown = False

    def __call__(self, value: object) -> None:
        """Show ``value`` as Jupyter shows the last value of a cell."""
        if self._shown:
            self._handle.update(value)
        else:
            self._handle.display(value)
        self._shown = True
