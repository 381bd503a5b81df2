"""How ptychodus' two files are called: the product, and the diffraction file beside it.

Used where they are read and written.
"""

from __future__ import annotations

import re
from pathlib import Path


def diffraction_path(product: Path) -> Path:
    """Where the frames of a product are: ``product`` in its name becomes ``diffraction``.

    ``product.h5`` has ``diffraction.h5``, and so has ``product.000007.h5``, one of several of a
    scan; ``ID.product.h5`` has ``ID.diffraction.h5``, ``image.h5`` has ``image.diffraction.h5``.
    """
    stem = re.sub(r"(?<![^.])product\.\d{6}$", "product", product.stem)
    if stem.split(".")[-1] == "product":
        return product.with_name(f"{stem.removesuffix('product')}diffraction{product.suffix}")
    return product.with_name(f"{stem}.diffraction{product.suffix}")


def product_path(diffraction: Path) -> Path:
    """Where the product of a diffraction file is; the other way round."""
    stem = diffraction.stem
    if stem == "diffraction" or stem.endswith(".diffraction"):
        prefix = stem.removesuffix("diffraction")
        named = diffraction.with_name(f"{prefix}product{diffraction.suffix}")
        if named.is_file() or not prefix:
            return named
        return diffraction.with_name(f"{prefix.removesuffix('.')}{diffraction.suffix}")
    return diffraction.with_name(f"{stem}.product{diffraction.suffix}")
