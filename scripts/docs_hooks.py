"""What MkDocs does besides: the README is the site's first page, lists of pages get their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LISTS = {"decisions/README.md": "Decisions"}


def first_page(readme: str) -> str:
    """The README with its links as seen from docs/; what lies outside is named, not linked."""

    def seen_from_docs(found: re.Match[str]) -> str:
        name, link = found.groups()
        return f"[{name}]({link.removeprefix('docs/')})" if link.startswith(("docs/", "http", "#")) else name

    text = re.sub(r"(srcset=\"|src=\")docs/", r"\1", readme)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", seen_from_docs, text)


def list_of(folder: Path, title: str) -> str:
    """A page that links those of a folder by their headings."""
    lines = [f"# {title}", ""]
    for path in sorted(folder.glob("[0-9]*.md")):
        heading = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"- [{heading}]({path.name})")
    return "\n".join(lines) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are no files in docs/."""
    from mkdocs.structure.files import File

    made = {"index.md": first_page((ROOT / "README.md").read_text(encoding="utf-8"))}
    made |= {name: list_of(ROOT / "docs" / Path(name).parent, title) for name, title in LISTS.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files
