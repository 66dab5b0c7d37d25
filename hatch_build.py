"""Makes the page of a package index from README.md, whose links are paths in this repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def for_index(readme: str, repository: str | None) -> str:
    """The README with addresses in place of paths, which an index cannot follow.

    Args:
        readme: the Markdown.
        repository: the address of the repository, or None while there is none. Then pictures are
            left out, and only the text of links stays.
    """
    if repository is None:
        return _LINK.sub(r"\1", _PICTURE.sub("", readme))
    address = repository.rstrip("/")
    readme = _PICTURE.sub(rf"![\1]({address}/raw/HEAD/\2)", readme)
    return _LINK.sub(rf"[\1]({address}/blob/HEAD/\2)", readme)


class ReadmeHook(MetadataHookInterface):
    """Takes the repository's address from `Repository` in `[project.urls]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_index(readme, repository),
        }
