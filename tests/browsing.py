"""A real browser for tests: Debian's Chromium, without a window."""

import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
REQUIRED = 'JAXRNN_BROWSER_REQUIRED'
"""Set where a missing browser is a failure, as in .ci/run."""

STARTED = 'Bokeh.documents.length && Bokeh.documents.every((one) => one.is_idle)'


class Opened(NamedTuple):
    """A page in a browser, with all that it said and asked for."""

    page: Any
    said: list[str]  # errors and warnings
    asked: list[str]  # addresses, the page's own among them
    seconds: float  # until all was drawn

    def shot(self, selector: str, number: int = 0) -> Any:
        """A picture of an element, as an array [height, width, 3]."""
        import io

        import numpy as np
        from PIL import Image

        taken = self.page.locator(selector).nth(number).screenshot()
        return np.asarray(Image.open(io.BytesIO(taken)).convert('RGB'))


def launched(playwright: Any) -> Any:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f'no browser found: {", ".join(BROWSERS)}')
        pytest.skip('no browser is installed: apt install chromium')
    return playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])


def opened(browser: Any, path: Path, **options: Any) -> Opened:
    return opened_at(browser, path.as_uri(), **options)


def opened_at(browser: Any, address: str, *, width: int = 1100, scheme: str = 'light') -> Opened:
    context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme)
    context.grant_permissions(['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on('console', lambda m: said.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda error: said.append(str(error)))
    page.on('request', lambda request: asked.append(request.url))
    begun = time.monotonic()
    page.goto(address)
    if page.evaluate('Boolean(window.Bokeh)'):
        page.wait_for_function(STARTED)
    return Opened(page, said, asked, time.monotonic() - begun)
