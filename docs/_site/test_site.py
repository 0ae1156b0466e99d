"""The built site, in its files and in a browser: ``make docs`` builds it into ``site/`` and runs this."""

from __future__ import annotations

import functools
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).resolve().parents[2] / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("index.html"))
#: Nothing but the page itself: no look for updates, no sync.
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1280,1024"
)


class Page(HTMLParser):
    """Links, pictures and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag refers to and what it can be referred to by."""
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links |= {value for name in ("href", "src") if (value := found.get(name))}


@functools.cache
def page(path: Path) -> Page:
    """A page of the site, read."""
    return Page(path.read_text())


@pytest.mark.parametrize("name", PAGES)
def test_no_list_or_fence_is_left_as_it_was_written(name: str) -> None:
    text = (SITE / name).read_text()
    assert not re.search(r"<p>[^<]*\n- |<p>[^<]*```", text), "lists need an empty line in front"


def test_the_site_is_there() -> None:
    assert len(PAGES) > 25, "make docs builds the site"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in page(SITE / name).links:
        url = urlparse(urljoin(f"http://site/{name}", link))
        if url.netloc != "site":
            continue
        target = SITE / unquote(url.path).lstrip("/")
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), f"{link} leads nowhere"
        if url.fragment and target.suffix == ".html":
            assert unquote(url.fragment) in page(target).anchors, f"{link}: no such anchor"


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site without a word."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    assert binary, f"none of {', '.join(names)} is installed; Debian's packages are chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in OPTIONS.split():
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_a_browser_shows_every_page_and_finds_words(browser: webdriver.Chrome, address: str) -> None:
    formulas = pictures = 0
    for name in PAGES:
        browser.get(address + name.removesuffix("index.html"))
        assert browser.find_element(By.TAG_NAME, "h1").text, name
        for image in browser.find_elements(By.CSS_SELECTOR, "article img"):
            shown = "return arguments[0].complete && arguments[0].naturalWidth > 0"
            assert browser.execute_script(shown, image), f"{name}: {image.get_attribute('src')} does not show"
            pictures += 1
        heights = "return [...document.querySelectorAll('math')].map(x => x.getBoundingClientRect().height)"
        found = browser.execute_script(heights)
        assert all(height > 5 for height in found), f"{name}: a formula is not drawn"
        formulas += len(found)
        assert "arithmatex" not in browser.page_source, f"{name}: a formula is left as it was written"
        said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not said, f"{name}: {said}"
    assert formulas > 100
    assert pictures >= 4

    browser.get(address)
    browser.execute_script("document.querySelector('[data-md-toggle=search]').click()")
    browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("peephole")
    results = WebDriverWait(browser, 20).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert any("recurrent-layers" in (result.get_attribute("href") or "") for result in results)
