"""The README's example, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.request import urlopen

from docutils import nodes
from docutils.core import publish_doctree

from .ports import free_port

README = Path(__file__).parent.parent / "README.rst"


def read_example() -> str:
    block = re.search(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text(encoding="utf-8"))
    assert block is not None
    return textwrap.dedent(block.group(1)).strip() + "\n"


def test_pictures_are_there_small_and_described() -> None:
    document = publish_doctree(
        README.read_text(encoding="utf-8"), settings_overrides={"report_level": 2, "halt_level": 2}
    )
    pictures = list(document.findall(nodes.image))
    assert len(pictures) == 2
    for each in pictures:
        assert (README.parent / each["uri"]).stat().st_size < 150_000
        assert each["alt"]


def test_example_is_at_most_fifteen_lines_long() -> None:
    assert len(read_example().splitlines()) <= 15


def test_example_serves_and_keeps_its_rows_when_it_is_started_again(tmp_path: Path) -> None:
    port = free_port()
    # wsgiref says nothing when it listens.
    program = read_example().replace("8000", str(port))
    program = program.replace(".serve_forever()", "").replace("make_server(", "server = make_server(")
    program += "print('listening', flush=True)\nserver.serve_forever()\n"
    (tmp_path / "visits.py").write_text(program, encoding="utf-8")
    for visits in ("1\n", "2\n"):
        with subprocess.Popen(
            [sys.executable, "visits.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "listening\n"
                with urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                    assert answer.read().decode() == f"Visit number {visits}"
            finally:
                server.terminate()
