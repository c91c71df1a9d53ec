"""Makes docs/page.png again: python docs/screenshot.py [--m3 FILE] [--gemma FILE] (flags of the server)."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server_process import ServerProcess  # noqa: E402


def main(arguments: list[str]) -> int:
    server = ServerProcess("--cache-mb", "0", *arguments)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1280, "height": 840}, color_scheme="light")
        page.goto(server.url)
        for _ in range(2):  # the first one loads gemma
            page.locator("#run").click()
            page.locator("#run:enabled").wait_for()
        page.get_by_label("Threshold").fill("0.88")
        picture = Image.open(io.BytesIO(page.screenshot()))
        picture.quantize(128).save(ROOT / "docs" / "page.png", optimize=True)
        browser.close()
    return server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
