"""The atlas in headless Chromium: clean pages, a matrix that filters and sorts, keyboard, phone, dark, no script."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lab.report import commands, site

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install dl-findings[browser]")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.calibration,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine"),
]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE, DESK = 390, 1280
LUMINANCE = """
const channel = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => channel(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = luminance(getComputedStyle(document.body).backgroundColor);
const worst = {};
for (const element of document.querySelectorAll("main *")) {
  if (element.closest("svg") || !element.textContent.trim()) continue;
  const own = luminance(getComputedStyle(element).color);
  const ratio = (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
  worst[element.className || element.tagName] = Math.min(ratio, worst[element.className || element.tagName] ?? 99);
}
return worst;
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site.write(site.build(commands.results()), tmp_path_factory.mktemp("pages") / "sub" / "atlas")


@pytest.fixture(scope="module")
def pages(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    started.set_page_load_timeout(120)
    yield started
    started.quit()


@pytest.fixture
def browser(driver: Any) -> Iterator[Any]:
    """The browser at a desk, in light colours, with scripts."""
    look(driver, DESK)
    yield driver
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    look(driver, DESK)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The site under a path of its own, as on GitHub Pages."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder.parent.parent))) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/sub/atlas/"
        served.shutdown()


def look(driver: Any, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def shown(browser: Any) -> list[list[str]]:
    """Cells of the visible rows of the matrix, as text."""
    script = "return [...document.querySelectorAll('#matrix tbody tr')].filter(r => !r.hidden)"
    return browser.execute_script(f"{script}.map(r => [...r.cells].map(c => c.innerText.trim()))")


def choose(browser: Any, name: str, value: str) -> None:
    Select(browser.find_element(By.NAME, name)).select_by_value(value)


@pytest.mark.parametrize("through", ["file", "server"])
def test_every_page_opens_and_asks_for_nothing_elsewhere(browser, folder, pages, server, through) -> None:
    base = f"{folder.as_uri()}/" if through == "file" else server
    browser.get_log("performance")
    for page in pages:
        browser.get(base + page)
        said = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert not said, f"{page}: {said}"
        assert browser.find_element(By.TAG_NAME, "h1").text
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith((base, "data:")) for url in asked), f"{page} asks for {asked}"
        failed = [one["params"] for one in events if one["method"] == "Network.loadingFailed"]
        assert not failed, f"{page}: {failed}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone(browser, folder, pages, scheme) -> None:
    look(browser, PHONE, scheme)
    for page in pages:
        browser.get(f"{folder.as_uri()}/{page}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE, page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, folder, scheme) -> None:
    look(browser, DESK, scheme)
    for page in ("index.html", "experiments/layer_knockout.html", "discrepancies.html"):
        browser.get(f"{folder.as_uri()}/{page}")
        weak = {name: ratio for name, ratio in browser.execute_script(LUMINANCE).items() if ratio < 4.5}
        assert not weak, f"{page}: {weak}"


def test_drawings_follow_the_colour_scheme(browser, folder) -> None:
    inks = []
    for scheme in ("light", "dark"):
        look(browser, DESK, scheme)
        browser.get(f"{folder.as_uri()}/experiments/layer_knockout.html")
        script = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        inks.append(sum(map(int, re.findall(r"\d+", browser.execute_script(script))[:3])))
    assert inks[0] < 150
    assert inks[1] > 600


def test_the_matrix_filters(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    everything = shown(browser)
    choose(browser, "kind", "published")
    published = shown(browser)
    assert published == [row for row in everything if row[2] == "published"]
    choose(browser, "verdict", "r")
    choose(browser, "subject", "0")
    assert shown(browser) == [row for row in published if "refuted" in row[4]]
    assert 0 < len(shown(browser)) < len(published)
    browser.find_element(By.NAME, "words").send_keys("LAYER")
    narrowed = shown(browser)
    assert narrowed
    assert all("layer" in (row[0] + row[1]).lower() for row in narrowed)
    assert browser.find_element(By.ID, "count").text == f"{len(narrowed)} of {len(everything)} claims"
    browser.find_element(By.CSS_SELECTOR, "#filters button").click()
    assert shown(browser) == everything


def test_the_matrix_finds_experiments_fragile_claims_and_differences(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    everything = shown(browser)
    choose(browser, "experiment", "layer_swap_cost")
    mine = [statement.id for statement in commands.results().by_experiment["layer_swap_cost"]]
    assert [row[0] for row in shown(browser)] == mine
    choose(browser, "experiment", "")
    choose(browser, "verdict", "f")
    assert shown(browser) == [row for row in everything if any("fragile" in cell for cell in row[4:])]
    choose(browser, "verdict", "d")
    words = [{word for cell in row[4:] for word in ("holds", "refuted") if word in cell} for row in everything]
    assert shown(browser) == [row for row, found in zip(everything, words, strict=True) if len(found) == 2]


def test_the_matrix_sorts(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    everything = shown(browser)
    claim, *_, first, _ = browser.find_elements(By.CSS_SELECTOR, "#matrix thead button")
    heads = browser.find_elements(By.CSS_SELECTOR, "#matrix thead th")
    column = next(index for index, head in enumerate(heads) if head.find_elements(By.TAG_NAME, "button") == [first])
    first.click()
    order = {"refuted": 0, "holds": 1, "n.a.": 2, "": 3}
    ranks = [order[next((word for word in order if word and word in row[column]), "")] for row in shown(browser)]
    assert ranks == sorted(ranks)
    assert heads[column].get_attribute("aria-sort") == "ascending"
    first.click()
    assert heads[column].get_attribute("aria-sort") == "descending"
    claim.click()
    assert shown(browser) == everything
    assert heads[column].get_attribute("aria-sort") is None
    claim.click()
    assert shown(browser) == everything[::-1]


def test_everything_is_within_reach_of_the_keyboard(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    skip = browser.switch_to.active_element
    assert skip.get_attribute("class") == "skip"
    assert skip.rect["y"] >= 0
    skip.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "content"
    seen: list[str] = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        here = browser.switch_to.active_element
        seen.append(here.get_attribute("name") or here.text or here.get_attribute("aria-label"))
        assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", here) != "none", seen[-1]
        if here.text.startswith("statement"):
            break
    assert {"words", "experiment", "kind", "subject", "verdict", "Show all"} <= set(seen)
    before = shown(browser)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert [row[1] for row in shown(browser)] != [row[1] for row in before]


def test_without_scripts_the_matrix_is_whole(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    count = len(shown(browser))
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(f"{folder.as_uri()}/index.html")
    assert not browser.find_element(By.ID, "filters").is_displayed()
    rows = browser.find_elements(By.CSS_SELECTOR, "#matrix tbody tr")
    assert len(rows) == count
    assert rows[0].is_displayed()


def test_a_claim_leads_to_its_reasons(browser, folder) -> None:
    browser.get(f"{folder.as_uri()}/index.html")
    link = browser.find_element(By.CSS_SELECTOR, "#matrix tbody th a")
    name = link.text
    link.click()
    target = browser.find_element(By.ID, name)
    assert target.tag_name == "article"
    assert browser.execute_script("return arguments[0].matches(':target')", target)
    target.find_element(By.TAG_NAME, "summary").click()
    assert "assert" in target.find_element(By.CSS_SELECTOR, "details pre").text
