"""What an optional part of the package needs, as a command that works wherever the package came from."""

from __future__ import annotations

import re


def install_command(*extras: str) -> str:
    """`pip install ...` of the packages behind these extras, by the names that package indexes have.

    The installed package's metadata lists them; a source tree without metadata is installed itself.
    """
    from importlib import metadata

    try:
        required = metadata.requires("rvllm") or []
    except metadata.PackageNotFoundError:
        return f'pip install ".[{",".join(extras)}]" in the source tree'
    found = []
    for line in required:
        need, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named and named[1] in extras:
            found.append(f'"{need.strip()}"' if re.search(r"[<>,=]", need) else need.strip())
    return f"pip install {' '.join(found)}" if found else f'pip install ".[{",".join(extras)}]"'
