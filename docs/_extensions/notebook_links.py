"""Makes the links between a notebook and the pages those of the site.

A notebook links to files, `../layers/moe.md`, as it is read outside of the site. MkDocs changes
such links in Markdown pages, and mkdocs-jupyter leaves those of notebooks as they are.
"""

import logging
import posixpath
import re
from typing import Any
from urllib.parse import unquote

log = logging.getLogger("mkdocs.plugins.notebook_links")  # a warning ends `mkdocs build --strict`

_LINK = re.compile(r'href="(?![a-z]+:|#)([^"#]+\.(?:md|ipynb))(#[^"]*)?"')


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Returns a notebook's page with links to pages; other pages as they are."""
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html

    def to_page(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(link[1])))
        target = files.get_file_from_path(path)
        if target is None:
            log.warning(f"{source!r} links to {link[1]!r}, which is not there.")
            return link[0]
        return f'href="{target.url_relative_to(page.file)}{link[2] or ""}"'

    return _LINK.sub(to_page, html)
