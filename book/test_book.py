"""The book in a browser: `make book-test`. Needs Chromium and its driver (Debian:
apt-get install chromium chromium-driver); without them everything is skipped."""

import functools
import http.server
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("selenium", reason="pip install -r book/requirements.txt")

from bs4 import BeautifulSoup  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

HERE = Path(__file__).resolve().parent
HTML = HERE / "_build" / "html"
PAGES = sorted(
    page.relative_to(HTML).as_posix()
    for page in HTML.rglob("*.html")
    if page.relative_to(HTML).parts[0] not in ("_modules", "_static")
)
CHAPTERS = [page for page in PAGES if re.match(r"chapters/\d\d_", page)]
AXE = "axe-core@4.14.1"
WIDTHS = [1280, 390]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *message):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the built book on this machine."""
    if not PAGES:
        pytest.skip("the book is not built: make book")
    handler = functools.partial(Quiet, directory=HTML)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if None in (found, driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def axe():
    """axe-core's source, from npm."""
    folder = HERE / "_build" / "axe"
    if not (folder / "package" / "axe.min.js").exists():
        if not shutil.which("npm"):
            pytest.skip("no npm, which brings axe-core")
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["npm", "pack", AXE], cwd=folder, capture_output=True)
        if done.returncode:
            pytest.skip(f"npm does not bring {AXE}")
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


def too_wide(browser, selector):
    """The texts of what is shown of these elements and scrolls sideways in itself."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.offsetParent)"
        ".map(e => e.innerText.trim())",
        selector,
    )


def in_columns(text):
    """Whether printed lines, one below the other, have a gap that ends at one place."""
    lines = [line for line in text.split("\n") if re.search(r"\S {2,}\S", line)]
    gaps = [{gap.end() for gap in re.finditer(r" {2,}(?=\S)", line)} for line in lines]
    aligned = any(one & other for one, other in zip(gaps, gaps[1:]))
    return aligned or bool(re.search("[─│┌└═║]", text))


def resize(browser, width):
    """The width of the page itself: a headless window has a smallest one. Returns once
    the page has heard of it, and is drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def open_page(browser, address):
    """The page in the light, once its formulas are set."""
    in_scheme(browser, "light")
    resize(browser, WIDTHS[0])
    browser.get(address)
    browser.execute_async_script(
        "const done = arguments[0];"
        "const typeset = window.MathJax?.startup?.promise ?? Promise.resolve();"
        "typeset.then(() => requestAnimationFrame(() => done()))"
    )


def in_scheme(browser, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.fixture(scope="session", params=PAGES)
def page(request, site, browser):
    """Each page in turn, opened."""
    browser.get_log("browser")
    open_page(browser, site + request.param)
    return request.param


class TestEachPage:
    def test_opens_without_an_error_and_without_the_network(self, page, site, browser):
        errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        errors = [e for e in errors if "favicon" not in e["message"]]
        assert not errors, errors
        loaded = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert all(name.startswith((site, "data:")) for name in loaded), loaded

    def test_figures_tables_and_formulas(self, page, browser):
        images = browser.execute_script(
            "return [...document.querySelectorAll('article img')].map(i => i.alt)"
        )
        assert all(len(alt) > 9 for alt in images), images
        text = text_of(browser, "innerText")
        assert "|---" not in text and "| ---" not in text, "a table as raw text"
        assert not browser.find_elements(By.CSS_SELECTOR, "mjx-merror")

    def test_figures_open_in_their_size(self, page, browser):
        plain = browser.execute_script(
            "return [...document.querySelectorAll('article img')]"
            ".filter(i => !i.closest('a')).map(i => i.alt)"
        )
        assert not plain, plain

    def test_formulas_fit_a_desk(self, page, browser):
        resize(browser, WIDTHS[0])
        wide = too_wide(browser, "mjx-container")
        assert not wide, wide

    def test_sentences_are_read_without_scrolling(self, page, browser):
        """On a telephone too, what is printed without columns goes on below."""
        resize(browser, WIDTHS[1])
        wide = too_wide(browser, ".cell_output .stream pre")
        assert all(map(in_columns, wide)), wide

    def test_no_word_is_broken_within(self, page, browser):
        """On a telephone a long name goes on below at one of its seams. (Addresses are
        parted anywhere, and what a model stammers.)"""
        resize(browser, WIDTHS[1])
        broken = browser.execute_script(
            "const texts = document.createTreeWalker("
            "  document.querySelector('article'), NodeFilter.SHOW_TEXT);"
            "const found = [], range = document.createRange();"
            "for (let node; (node = texts.nextNode());) {"
            "  if (node.parentElement.closest('pre, svg, mjx-container')) continue;"
            "  const words = /(?<![^\\s(“-])[A-Za-z]{6,40}(?![A-Za-z])/g;"
            "  for (const word of node.data.matchAll(words)) {"
            "    range.setStart(node, word.index);"
            "    range.setEnd(node, word.index + word[0].length);"
            "    if (range.getClientRects().length > 1) found.push(word[0]);"
            "  }"
            "}"
            "return found;"
        )
        assert not broken, broken

    def test_code_keeps_its_lines(self, page, browser):
        """On a telephone too, source code that a cell shows is not set as prose."""
        resize(browser, WIDTHS[1])
        broken = browser.execute_script(
            "return [...document.querySelectorAll('.highlight-python pre')]"
            ".filter(e => getComputedStyle(e).whiteSpace.includes('wrap'))"
            ".map(e => e.innerText)"
        )
        assert not broken, broken[0]

    def test_no_line_for_what_is_not_seen(self, page, browser):
        """The link of a heading or a signature, hidden until the mouse stands over it,
        makes no line of its own; that to the source stands beside the signature."""
        for width in WIDTHS:
            resize(browser, width)
            taller = browser.execute_script(
                "const all = [...document.querySelectorAll("
                "  'article :is(h1, h2, h3, h4, dt.sig)')];"
                "const before = all.map(e => e.offsetHeight);"
                "const style = document.createElement('style');"
                "style.textContent = '.headerlink {display: none !important}';"
                "document.head.append(style);"
                "const found = all.filter((e, i) => e.offsetHeight < before[i])"
                "  .map(e => e.innerText);"
                "style.remove();"
                "return found;"
            )
            assert not taller, (width, taller)
        inside = browser.execute_script(
            "return [...document.querySelectorAll('dt.sig .viewcode-link')]"
            ".filter(e => e.getBoundingClientRect().bottom"
            " > e.closest('dt').getBoundingClientRect().bottom + 1)"
            ".map(e => e.closest('dt').innerText)"
        )
        assert not inside, inside

    def test_tables_and_code_fit_a_desk(self, page, browser):
        resize(browser, WIDTHS[0])
        wide = too_wide(browser, "article pre, .table-wrapper")
        assert not wide, wide

    def test_needs_no_scrolling_sideways(self, page, browser):
        for width in WIDTHS:
            resize(browser, width)
            wide = browser.execute_script(
                "return document.documentElement.scrollWidth - innerWidth"
            )
            assert wide <= 0, f"{wide} pixels too wide at {width}"

    def test_axe_finds_no_serious_fault(self, page, browser, axe):
        """In the light at a desk's width, in the dark at a telephone's."""
        browser.execute_script(axe)
        for width, scheme in zip(WIDTHS, ("light", "dark")):
            resize(browser, width)
            in_scheme(browser, scheme)
            found = browser.execute_async_script(
                "const done = arguments[0];"
                "axe.run(document, {resultTypes: ['violations']})"
                ".then(result => done(result.violations))"
            )
            serious = [
                (fault["id"], [node["html"][:160] for node in fault["nodes"][:4]])
                for fault in found
                if fault["impact"] in ("serious", "critical")
            ]
            assert not serious, (width, scheme, serious)

    def test_no_code_is_longer_than_a_screen(self, page, browser):
        """What is longer is folded, as imports are."""
        if page not in CHAPTERS:
            return
        code = browser.execute_script(
            "return [...document.querySelectorAll('article .cell_input pre')]"
            ".filter(e => e.offsetParent).map(e => e.innerText)"
        )
        assert code and max(len(text.strip().splitlines()) for text in code) <= 40
        assert not any(text.count("import ") > 12 for text in code)

    def test_verdicts_are_badges(self, page, browser):
        """No sign needs a font of emoji; each kind has a colour of its own."""
        text = text_of(browser, "innerText")
        assert not re.search("[✅❌⚖◻]", text)
        if page in CHAPTERS:
            badges = browser.execute_script(
                "return [...document.querySelectorAll('.verdict')].map(e =>"
                "[e.innerText.slice(2).trim(), getComputedStyle(e).backgroundColor])"
            )
            kinds = dict(badges)
            assert {"Right", "Not yet"} <= set(kinds) and len(kinds) > 2
            claims = [kinds[k] for k in ("RIGHT", "WRONG", "DEPENDS") if k in kinds]
            assert len(set(claims)) == len(claims)

    def test_solutions_are_closed_until_clicked(self, page, browser):
        if page not in CHAPTERS:
            return  # no exercises
        resize(browser, WIDTHS[0])
        assert "BEGIN SOLUTION" not in text_of(browser, "innerText")
        solutions = [
            details
            for details in browser.find_elements(By.CSS_SELECTOR, "article details")
            if "BEGIN SOLUTION" in details.get_attribute("textContent")
        ]
        everywhere = text_of(browser, "textContent").count("BEGIN SOLUTION")
        assert len(solutions) == everywhere > 0
        for details in solutions:
            summary = details.find_element(By.TAG_NAME, "summary")
            browser.execute_script("arguments[0].click()", summary)
        assert text_of(browser, "innerText").count("BEGIN SOLUTION") == everywhere

    def test_numbers_stay_with_their_units(self, page):
        """No line ends between 90 and %."""
        if page.startswith("api/"):
            return  # docstrings
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        article = soup.select_one("article")
        for part in article.select("h1, h2, h3, pre, code, .math, svg"):
            part.decompose()
        units = r".{20}\d (?:%|±|[kMGT]i?B\b|ms\b|points\b).{9}"
        parted = re.search(units, article.get_text())
        assert not parted, parted[0]
        for text in article.find_all(string=re.compile(r"\d to \d| / r\b|\(\d, \d\)")):
            assert "together" in text.parent.get("class", []), text

    def test_names_of_models_stay_in_one_line(self, page):
        """Llama-3-8B is not parted at its hyphens."""
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        for name in soup.select("article")[0].find_all(string=re.compile(r"[a-z]-\d")):
            if not name.find_parent(["pre", "code", "h1", "h2", "h3", "svg"]):
                held = "together" in name.parent.get("class", [])
                assert held or not re.search(r"\b[A-Z]\w+-\d", name), name

    def test_commas_stay_with_their_formulas(self, page):
        """Nor does a line end between a formula and the bracket before it."""
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        for formula in soup.select("article span.math"):
            if "together" not in formula.parent.get("class", []):
                after, before = formula.next_sibling, formula.previous_sibling
                assert not re.match(r"[.,;:?!)\]]", str(after or "")), formula.parent
                assert not re.search(r"[(\[]$", str(before or "")), formula.parent

    def test_no_warning_names_a_machine(self, page):
        """What a notebook prints has no path of the machine that ran it."""
        text = (HTML / page).read_text(encoding="utf-8")
        found = re.search(r"/\S+\.py:\d+: \w*Warning", text)
        assert not found, found[0]

    def test_folded_code_is_as_large_as_other_code(self, page, browser):
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('article .cell_input pre')]"
            ".map(e => getComputedStyle(e).fontSize)"
        )
        assert len(set(sizes)) < 2, set(sizes)

    def test_links_hold(self, page):
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        for link in soup.select("article a[href]"):
            target, anchor = map(unquote, urldefrag(link["href"]))
            if ":" in target.partition("/")[0]:
                continue
            file = (HTML / page).parent / target if target else HTML / page
            assert file.is_file(), link["href"]


def text_of(browser, kind):
    """The page's innerText, which is what one sees, or its textContent."""
    return browser.execute_script(
        f"return (document.querySelector('article') ?? document.body).{kind}"
    )


def test_chapters_lead_to_each_other(site, browser):
    """From the list of chapters by "next" through all of them, in their order."""
    open_page(browser, site + "chapters/README.html")
    seen = []
    while len(seen) < len(CHAPTERS):
        follow(browser, "a.next-page")
        seen.append(browser.current_url.removeprefix(site).partition("#")[0])
    assert seen == CHAPTERS
    follow(browser, "a.prev-page")
    assert browser.current_url == site + CHAPTERS[-2]


def follow(browser, selector):
    link = browser.find_element(By.CSS_SELECTOR, selector)
    browser.get(link.get_attribute("href"))


@pytest.mark.parametrize("word", ["NF4", "AdapterFusion"])
def test_search(site, browser, word):
    open_page(browser, f"{site}search.html?q={word}")
    WebDriverWait(browser, 60).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, "#search-results li a")
    )
    assert word in browser.find_element(By.ID, "search-results").text


def test_search_without_a_word_asks_for_one(site, browser):
    """The search box of a telephone is behind a button: the page has its own."""
    open_page(browser, f"{site}search.html")
    resize(browser, WIDTHS[1])
    box = browser.find_element(By.CSS_SELECTOR, "article input[type=search]")
    assert box.is_displayed() and box.get_attribute("name") == "q"
    box.send_keys("NF4")
    box.submit()
    WebDriverWait(browser, 60).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, "#search-results li a")
    )


def test_reference_has_every_public_name():
    """No page is empty, and what README shows is there."""
    found = set()
    for page in (page for page in PAGES if page.startswith("api/")):
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        names = {name["id"] for name in soup.select("dt.sig[id]")}
        assert names, page
        found |= {name.rpartition(".")[2] for name in names}
    expected = {"LoraConfig", "PeftModel", "get_peft_model", "train", "evaluate"}
    expected |= {"generate", "load_data", "load_pretrained", "load_tokenizer"}
    assert expected <= found, expected - found


def test_reference_says_something_of_every_class():
    """More than its bases and a signature that takes everything; and what it inherits
    from this package is there too, which is what one has to know to use it."""
    for page in (page for page in PAGES if page.startswith("api/")):
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        for entry in soup.select("dl.py.class, dl.py.exception"):
            said = [
                part.get_text()
                for part in entry.select_one("dd").select("p, pre")
                if not part.get_text().startswith("Bases:")
            ]
            name = entry.select_one("dt")["id"]
            assert any(len(text) > 9 for text in said), (page, name)
            assert "*args: Any" not in entry.select_one("dt").get_text(), name
    text = BeautifulSoup((HTML / "api/minipeft.html").read_text(encoding="utf-8"))
    shown = {pre.get_text() for pre in text.select("article pre")}
    for field in ("num_virtual_tokens: int", "alpha: float", "module_dropout: float"):
        assert any(field in block for block in shown), field
    methods = {name["id"].rpartition(".")[2] for name in text.select("dt.sig[id]")}
    assert {"print_trainable_parameters", "enable_input_require_grads"} <= methods


def test_every_page_of_the_course_is_there():
    """Whatever chapters/ holds is in the book."""
    folder = HERE.parent / "chapters"
    for chapter in folder.glob("[0-9][0-9]_*.ipynb"):
        assert f"chapters/{chapter.stem}.html" in CHAPTERS
    for page in ("index.html", "chapters/claims.html", "chapters/instructor.html"):
        assert page in PAGES
    assert ("chapters/which_one.html" in PAGES) == (folder / "which_one.md").exists()
