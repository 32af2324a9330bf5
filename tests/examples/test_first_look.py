"""The first program of the README: what it prints, and that it is the same every time."""
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_six_words_are_said_in_american_then_in_british_then_in_american_again():
    """Every page that has the marker shows what the program prints.

    Other kernels may move the scores of unseen words by a few words, so these are compared to one point."""
    done = subprocess.run([sys.executable, str(EXAMPLES / "first_look.py")], capture_output=True, text=True,
                          timeout=120, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    number, marker = re.compile(r"\d+\.\d+"), "<!-- first_look.py -->"
    pages = [page.read_text("utf-8") for page in (EXAMPLES / "README.md", EXAMPLES.parent / "README.md")]
    assert marker in pages[0]
    for page in (page for page in pages if marker in page):
        shown = re.search(marker + r"\n```text\n(.*?)```", page, re.DOTALL).group(1)
        assert number.sub("N", done.stdout) == number.sub("N", shown)
        for printed, on_page in zip(number.findall(done.stdout), number.findall(shown), strict=True):
            assert abs(float(printed) - float(on_page)) <= 1
    base, british, again = (line[16:].split() for line in done.stdout.splitlines()[1:4])
    assert base == again and all(a != b for a, b in zip(base, british, strict=True))
