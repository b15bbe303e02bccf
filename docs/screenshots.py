"""Makes the pictures of docs/report.md, from the demo's run.

python scripts/demo.py
python docs/screenshots.py --run_dir=runs/demo
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import io
import tempfile

import browsing
from PIL import Image
from playwright import sync_api

from jaxrnn.cli import common, own_runs
from jaxrnn.report import page

TOP = {'x': 0, 'y': 0, 'width': 1100, 'height': 980}
COLOURS = 256
"""Of a picture: it has few, and is a third as large for it."""


def main(arguments: list[str]) -> int:
    del arguments
    directory = common.run_dir()
    with tempfile.TemporaryDirectory() as temporary, sync_api.sync_playwright() as playwright:
        target = page.write(directory, own_runs.alarms_of(directory), path=Path(temporary) / 'report.html')
        opened = browsing.opened(browsing.launched(playwright), target)
        _save('report', opened.page.screenshot(clip=TOP, full_page=True))
        _save('experiments', opened.page.locator('section', has_text='under one change').first.screenshot())
        _save('gates', opened.page.locator('section', has_text='over time').last.screenshot())
        opened.page.context.browser.close()
    return 0


def _save(name: str, picture: bytes) -> None:
    path = ROOT / 'docs' / 'images' / f'{name}.png'
    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(picture)).convert('RGB').quantize(COLOURS).save(path, optimize=True)


if __name__ == '__main__':
    common.define('pictures', 'run_dir', 'runs/demo', 'The run of the demo.')
    common.main(main, __doc__)
