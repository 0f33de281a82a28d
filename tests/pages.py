"""Reading report pages: the data that they hold for their script, and the text that a reader sees."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from typing import Any


def unpack(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def data(page: str, name: str) -> Any:
    """Return what a page holds for its script under a name: "figures", "cells" or "episodes"."""
    found = re.search(rf'id="data-{name}">(.*?)</script>', page, re.S)
    assert found is not None
    return unpack(found[1])


def markup(page: str) -> str:
    """Return a page without its data and scripts."""
    return page[: page.index("<script")]


def shown(page: str) -> str:
    """Return the text that a reader sees, without figures."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup(page)[page.index("<body>") :]))


def places(page: str) -> list[str]:
    """Return the names of the figures that have a place on a page, sorted."""
    return sorted(re.findall(r'data-figure="([a-z0-9-]+)"', markup(page)))


def loads_nothing(page: str) -> bool:
    """Return whether all links of a page lead into itself or to its figures' files."""
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", markup(page))
    inside = all(re.fullmatch(r"#[\w-]+|figures/[a-z0-9-]+\.(svg|csv)", link) for link in links)
    return inside and "default-src 'none'" in page and "url(" not in markup(page) and "@import" not in markup(page)
