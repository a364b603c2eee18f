"""The report of a sweep: one file that shows everything as text, looked at in a real browser."""

from __future__ import annotations

import html.parser
import re
from collections import Counter
from pathlib import Path

import pytest
from chromium import CHROMIUM, Page

from fxrpg.sweep import picture, report
from fxrpg.sweep.outcome import Outcome, outcome
from fxrpg.sweep.processes import Failure
from fxrpg.sweep.results import Row
from fxrpg.sweep.task import Job, Task

HOSTILE = '</td><script>document.title = "gone"</script><img src="https://example.com/x" onerror="document.title=1">{{ 7 * 6 }}'
NAME = "<b>$x_{</b>\"'&amp;\x1b[2J\u202emodnar.py"
LONG = "x" * 300


def rows(sizes: int = 5, seeds: int = 3) -> list[Row]:
    dofs = [None, *(4**power for power in range(4, 4 + sizes))]
    common = {"task": NAME, "method": HOSTILE, "arguments": "[]", "code": "0" * 64, "threads": 1, "seconds": 2.5}
    common |= {"fxrpg": "1.0", "torch": "2.0", "python": "3.11", "finished": "2026-01-31T12:34:56+00:00"}
    return [
        Row(**common, dof=dof, seed=seed, accuracy=1 - (0.4 * (dof or 10**5) ** -0.3) * (1 + 0.1 * seed))  # type: ignore[arg-type]
        for dof in dofs
        for seed in range(seeds)
    ]


def write(path: Path, made: list[Row], within: float = 1.0) -> Outcome:
    task = Task(name=NAME, method=HOSTILE, program=(NAME,), arguments=(HOSTILE, LONG), code="0" * 64)
    found = outcome(made, within)
    failures = [Failure(Job(256, 9), f"exit code 1; its stderr ends with: {HOSTILE} {LONG}")]
    report.write(task, made, found, failures, path)
    return found


class Parsed(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_hostile_settings_are_shown_and_nothing_else(tmp_path):
    write(tmp_path / "report.html", rows())
    page = Parsed((tmp_path / "report.html").read_text())
    assert page.tags["script"] == page.tags["b"] == 0
    assert page.tags["img"] == 1
    assert HOSTILE in page.text, "as text, and no template of its own"
    assert r'<b>$x_{</b>"' + "'&amp;" + r"\x1b[2J\u202emodnar.py" in page.text
    assert not any(name.startswith("on") for name, _ in page.attributes)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset") and value]
    assert len(addresses) == 5
    assert all(address.startswith("data:") for address in addresses)


def test_table_and_recommendation(tmp_path):
    found = write(tmp_path / "report.html", rows())
    text = Parsed((tmp_path / "report.html").read_text()).text
    assert found.advice.text in text
    assert "95% interval" in text
    lines = re.sub(r"\s+", " ", text)
    for size in found.sizes:
        assert size.gap is not None
        assert f"{size.name} {size.mean:.2f} ± {size.std:.2f} {size.gap.points:.2f} (" in lines
    assert "2026-01-31 12:34 UTC" in lines


@pytest.mark.parametrize(
    "accuracies",
    [
        {None: [1.0], 10: [1.0]},
        {10: [0.5, 0.6]},
        {None: [0.9, 0.8]},
        {0.1: [0.0], 1.0: [1.0]},
        {None: [1.0], 5: [1.0, 0.9]},
    ],
)
def test_extremes_are_drawn_and_told(accuracies, tmp_path):
    """No small model, no dense one, a single size, no errors or nothing right; a name that the font does not have."""
    first = rows()[0]
    made = [
        Row(**{**vars(first), "task": "模型.py", "dof": dof, "seed": seed, "accuracy": accuracy})
        for dof, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]
    found = write(tmp_path / "report.html", made, within=0.0)
    picture.write_png(found, "模型.py $x_{", tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert found.advice.text in Parsed((tmp_path / "report.html").read_text()).text


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs the program chromium on the PATH (Debian: apt-get install chromium)"
)
def test_in_a_browser(tmp_path):
    """On a phone and a desktop, light and dark: all is there, nothing sticks out, is asked for or complained of."""
    write(tmp_path / "report.html", rows(sizes=9))
    url = (tmp_path / "report.html").as_uri()
    seen = set()
    with Page(tmp_path / "profile") as page:
        for width in (390, 1280):
            for dark in (False, True):
                page.open(url, width=width, dark=dark)
                seen.add(
                    (page.value("document.images[0].currentSrc"), page.value("getComputedStyle(document.body).color"))
                )
                page.value("document.querySelector('details').open = true")
                assert page.value("document.title") == f"Sweep of {report.visible(NAME)}"
                assert page.value("document.querySelectorAll('#sizes tbody tr').length") == 10
                assert page.value("document.querySelectorAll('#runs tbody tr').length") == 30
                assert page.value("[...document.images].map(i => i.complete && i.naturalWidth > 300)") == [True]
                assert page.value("document.documentElement.scrollWidth") <= width, "no horizontal scroll"
                assert page.value("document.documentElement.clientWidth") > width - 20
                boxes = (
                    "[...document.querySelectorAll('section, #sizes, img')].map(e => e.getBoundingClientRect().right)"
                )
                assert max(page.value(boxes)) <= width
                assert complaints(page) == []
                page.screenshot(tmp_path / f"{width}-{dark}.png")
                assert (tmp_path / f"{width}-{dark}.png").read_bytes().startswith(b"\x89PNG")
    assert len(seen) == 4, "a picture of its own for each width and scheme"


def complaints(page: Page) -> list[str]:
    """What the console said, what failed, and what was asked for outside the file."""
    wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
    found = [f"{method}: {told}" for method, told in page.events if method in wrong]
    asked = [told["request"]["url"] for method, told in page.events if method == "Network.requestWillBeSent"]
    assert asked
    return found + [url for url in asked if not url.startswith(("file:", "data:"))]
