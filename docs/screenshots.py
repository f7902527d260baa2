"""Makes the pictures of the documentation from the running demo: ``make screenshots``, with chromium and chromedriver.

The demo runs from a copy in a temporary folder, so that the stacks on its pages show no other folder.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.integration.browser import browsing, show_as, wait_for_next_page  # noqa: E402

FOLDER = ROOT / "docs" / "_static"
WIDTH = 1280
#: A page index and a reader's line have patience for so many bytes.
BYTES_AT_MOST = 150_000


@contextmanager
def demo() -> Iterator[tuple[str, str]]:
    """What ``make demo`` serves: the addresses of its first page and of the inspector."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        examples = shutil.copytree(
            ROOT / "examples", Path(folder) / "examples", ignore=shutil.ignore_patterns("*.db*", "__pycache__")
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "guestbook", "--port", "0"],
            cwd=examples,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(examples)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            first, inspector = (re.search(r"http://\S+", process.stdout.readline()) for _ in range(2))
            assert first, "the demo has not started"
            assert inspector, "the demo has no inspector"
            yield first[0], inspector[0]
        finally:
            process.terminate()
            process.wait()


def take(driver: Any, name: str, first: str, last: str) -> None:
    """Store a picture of a page, from one element to another, as a PNG with a palette."""
    rectangle = "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.top, r.bottom]"
    scrolled = driver.execute_script("return window.scrollY")
    top = driver.execute_script(rectangle, first)[0] + scrolled
    bottom = driver.execute_script(rectangle, last)[1] + scrolled
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top, "scale": 1}
    taken = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
    )
    picture = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    path = FOLDER / f"{name}.png"
    # Median cut would leave out the colors of a few letters.
    picture.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    assert size < BYTES_AT_MOST, f"{path.name} has {size} bytes"
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {size} bytes")


def main() -> None:
    with demo() as (address, inspector), browsing() as driver:
        show_as(driver, WIDTH, "light")
        driver.get(f"{address}experiments/")
        for name in ("failure", "streams", "last-ticket"):
            button = driver.find_element("css selector", f"#{name} button")
            button.click()
            wait_for_next_page(driver, button)
        take(driver, "experiment-failure", "#failure", "#failure")
        take(driver, "experiment-streams", "#streams", "#streams")
        driver.get(inspector)
        # The buyer who was told in the second attempt that it is sold out.
        row = next(each for each in driver.find_elements("css selector", "#requests tr") if "409" in each.text)
        link = row.find_element("css selector", "a")
        link.click()
        wait_for_next_page(driver, link)
        take(driver, "inspector", "main", "section[aria-labelledby=statements]")


if __name__ == "__main__":
    main()
