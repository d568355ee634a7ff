"""Every page of the built book in headless Chromium, at desktop and phone width.

``BOOK_SITE`` names the folder of the site (default: the smoke profile's). ``BOOK_SCREENSHOTS``, if set, names
a folder that gets a picture of each page, by day and by night. Without a browser the tests are skipped,
except where ``CI=true``: there nothing may be skipped in silence.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("BOOK_SITE") or ROOT / "build" / "smoke" / "html").resolve()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.glob("book/**/*.html"))
VIEWPORTS = {"desktop": (1280, 900), "phone": (390, 844)}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What sticks out of the window, for the message: the innermost few that no box of their own scrolls.
STICKS_OUT = """() => [...document.querySelectorAll('body *')].filter(e => {
    const r = e.getBoundingClientRect();
    if (!r.width || r.right <= innerWidth + 1) return false;
    for (let p = e; p && p !== document.body; p = p.parentElement)
        if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
}).slice(-5).map(e => e.outerHTML.slice(0, 160))"""
RAW_MATHS = """() => {
    const article = document.querySelector('article').cloneNode(true);
    article.querySelectorAll('pre, code, script, style, mjx-container').forEach(e => e.remove());
    return (article.textContent.match(/\\\\\\(|\\\\\\[|\\$\\$/g) || []).length;
}"""
OPEN_ALL = """() => {
    document.querySelectorAll('article details').forEach(e => { e.open = true; });
    document.querySelectorAll('article .toggle-button-hidden').forEach(e => e.click());
}"""
IMAGES = """async () => Promise.all([...document.querySelectorAll('article img')].map(async image => {
    image.loading = 'eager';
    try { await image.decode(); } catch (error) { /* width 0 tells */ }
    return {source: image.src, alt: image.alt.trim(), width: image.naturalWidth};
}))"""


# Text of too little contrast with what is behind it, by the rule of WCAG 2 (AA): 4.5 to 1, large text 3 to 1.
FAINT = """() => {
    const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3])).concat(1);
    const light = c => c.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        const layers = [];
        for (let p = e; p; p = p.parentElement) {
            const c = parse(getComputedStyle(p).backgroundColor);
            layers.unshift(c);
            if (c[3] === 1) break;
        }
        return layers.reduce((below, c) => over(c, below), [255, 255, 255, 1]);
    };
    const found = {};
    const walker = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement, style = getComputedStyle(e);
        if (!walker.currentNode.textContent.trim() || !e.getClientRects().length) continue;
        if (style.visibility !== 'visible') continue;
        if (e.closest('script, style, mjx-assistive-mml, .headerlink')) continue;
        const back = behind(e), front = over(parse(style.color), back);
        const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
        const size = parseFloat(style.fontSize), ratio = (a + 0.05) / (b + 0.05);
        const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
        if (ratio < least) found[`${e.tagName}.${e.className} ${style.color} on ${back.slice(0, 3)}`] =
            `${ratio.toFixed(2)}: ${e.textContent.trim().slice(0, 40)}`;
    }
    return found;
}"""
CLOSED = """() => [...document.querySelectorAll('article details, article .admonition.toggle')]
    .filter(e => { const last = e.lastElementChild.getBoundingClientRect(); return last.height < 2; })
    .map(e => e.outerHTML.slice(0, 160))"""


def unavailable(reason):
    """Skip, but fail in CI and where a site was asked for by name."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI must not skip the pages", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def site():
    """The site's address on a server of its own."""
    if not PAGES:
        reason = f"no built book in {SITE}; run `python book/run.py --profile smoke` first"
        if os.environ.get("BOOK_SITE"):
            pytest.fail(reason, pytrace=False)
        unavailable(reason)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed; run `make setup`")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        unavailable("no Chromium on this machine; install the package `chromium`")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Visit:
    """One page opened in a window of its own, with all that went wrong while it loaded."""

    def __init__(self, browser, site, size, mode="light"):
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=mode)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.site, self.problems = site, []
        host = urlsplit(site).netloc
        self.page.route(
            lambda url: urlsplit(url).scheme in ("http", "https") and urlsplit(url).netloc != host,
            lambda route: (self.problems.append(f"asks another host: {route.request.url}"), route.abort()),
        )
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url} {r.failure}"))
        self.page.on("response", lambda r: r.status >= 400 and self.problems.append(f"{r.status}: {r.url}"))

    def open(self, path):
        self.page.goto(f"{self.site}/{path}", wait_until="load")
        if self.page.evaluate("typeof MathJax !== 'undefined'"):
            self.page.wait_for_function("MathJax.startup && MathJax.startup.promise")
            self.page.evaluate("MathJax.startup.promise.then(() => true)")
        return self.page

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def picture(page, name):
    if folder := os.environ.get("BOOK_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_there_are_pages(site):
    assert "book/index.html" in PAGES
    assert len(PAGES) > 1


def test_buttons_give_the_generated_notebooks(site):
    notebooks = {path.stem: path for path in SITE.glob("_sources/book/*.ipynb")}
    pages = {Path(path).stem: (SITE / path).read_text(encoding="utf-8") for path in PAGES}
    chapters = {name for name in pages if name in notebooks}
    colab = {
        name: re.findall(r'href="https://colab\.research\.google\.com/github/([^"]+)"', text)
        for name, text in pages.items()
    }
    assert chapters
    assert not any(colab[name] for name in pages.keys() - chapters), "a Colab button without a notebook"
    with_button = {name for name in chapters if colab[name]}
    assert with_button in (set(), chapters), "some chapters lack the Colab button"
    for name in chapters:
        assert f'href="../_sources/book/{name}.ipynb"' in pages[name], f"{name}: no download button"
        for link in colab[name]:
            assert re.fullmatch(rf"[\w.-]+/[\w.-]+/blob/notebooks/.+/book/{re.escape(name)}\.ipynb", link)
        notebook = json.loads(notebooks[name].read_text(encoding="utf-8"))
        assert notebook["metadata"]["accelerator"] == "GPU", f"{name}: not the generated notebook"
        assert not any(cell.get("outputs") for cell in notebook["cells"])
        text = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
        assert not re.search(r"\{[\w:.+-]+\}`|^[> ]*(```+|:::+)\s*\{", text, flags=re.MULTILINE)
        if chapters == notebooks.keys():  # with chapters left out, the pages count differently
            for kind, pattern in (
                ("Exercise", r'caption-number">Exercise ([\d.]+)'),
                ("equation", r'class="eqno">\(([\d.]+)\)'),
            ):
                shown = set(re.findall(pattern, pages[name]))
                marks = {"Exercise": r"^### Exercise ([\d.]+)", "equation": r"\\tag\{([\d.]+)\}"}
                written = set(re.findall(marks[kind], text, flags=re.MULTILINE))
                assert shown == written, f"{name}: {kind} numbers of page and notebook differ"


# The rooms of the reference are all made alike: the narrow window, where things stick out, is enough.
VISITS = [(path, size) for path in PAGES for size in VIEWPORTS if size == "phone" or "book/api/" not in path]


@pytest.mark.parametrize(("path", "viewport"), VISITS)
def test_page(browser, site, path, viewport):
    source = (SITE / path).read_text(encoding="utf-8")
    with Visit(browser, site, VIEWPORTS[viewport]) as visit:
        page = visit.open(path)
        if 'class="math ' in source:
            assert page.locator("article mjx-container").count() > 0, "no mathematics was rendered"
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, "MathJax could not read a formula"
        assert page.evaluate(RAW_MATHS) == 0, "mathematics left as source"
        for image in page.evaluate(IMAGES):
            assert image["alt"], f"no alt text: {image['source']}"
            assert image["width"] > 0, f"not shown: {image['source']}"
        # Every dropdown open: what is hidden at first must fit too.
        page.evaluate(OPEN_ALL)
        width = page.evaluate("document.scrollingElement.scrollWidth")
        inner = page.evaluate("window.innerWidth")
        assert width <= inner, f"{width} px wide in a window of {inner}: {page.evaluate(STICKS_OUT)}"
        name = f"{path.removeprefix('book/').removesuffix('.html').replace('/', '-')}-{viewport}"
        picture(page, name)
        if os.environ.get("BOOK_SCREENSHOTS"):
            page.evaluate("document.documentElement.dataset.theme = 'dark'")
            picture(page, f"{name}-dark")
        assert not visit.problems


def test_dark_mode_by_the_reader_s_setting(browser, site):
    with Visit(browser, site, VIEWPORTS["desktop"], mode="dark") as visit:
        page = visit.open("book/index.html")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 80, f"a light page: {colour}"
        assert not visit.problems


def test_search_finds_a_page(browser, site):
    with Visit(browser, site, VIEWPORTS["desktop"]) as visit:
        page = visit.open("search.html?q=energy")
        page.wait_for_selector("ul.search li a")
        assert not visit.problems


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("path", ["index", "energy-and-langevin", "papers", "api/langevin"])
def test_text_stands_out_from_its_background(browser, site, path, mode):
    if f"book/{path}.html" not in PAGES:
        pytest.skip(f"{path} is not in this build")
    with Visit(browser, site, VIEWPORTS["desktop"], mode=mode) as visit:
        page = visit.open(f"book/{path}.html")
        page.evaluate(OPEN_ALL)
        assert page.evaluate(FAINT) == {}


def test_the_keyboard_reaches_the_text_and_shows_where_it_is(browser, site):
    with Visit(browser, site, VIEWPORTS["desktop"]) as visit:
        page = visit.open("book/index.html")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.skip-link') !== null"), (
            "no skip link comes first"
        )
        page.wait_for_function("document.activeElement.getBoundingClientRect().top >= 0")  # it slides in
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#main-content"
        for _ in range(60):  # what follows lies in the text, links of the bar above it apart
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('article') !== null"):
                break
        else:
            pytest.fail("from the skip link no key press leads into the text")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline not in ("none", "hidden"), "the focus is not seen"
        assert not visit.problems


def test_a_chapter_prints_whole(browser, site, tmp_path):
    """On paper: no navigation, what was closed is open, nothing sticks out, and the text is all there."""
    try:
        from pypdf import PdfReader
    except ImportError:
        unavailable("pypdf is not installed; run `make setup`")
    path = "book/energy-and-langevin.html"
    if path not in PAGES:
        pytest.skip("the chapter is not in this build")
    with Visit(browser, site, (794, 1123)) as visit:  # A4 at 96 dots an inch
        page = visit.open(path)
        page.emulate_media(media="print")
        assert page.locator(".bd-sidebar-primary, .bd-sidebar-secondary, .prev-next-footer").count() > 0
        for shown in page.locator(".bd-sidebar-primary, .bd-sidebar-secondary, .prev-next-footer").all():
            assert not shown.is_visible()
        assert page.evaluate(CLOSED) == []
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 794, page.evaluate(STICKS_OUT)
        page.pdf(path=str(tmp_path / "chapter.pdf"), format="A4")
    paper = PdfReader(tmp_path / "chapter.pdf")
    assert 5 < len(paper.pages) < 40
    text = " ".join(" ".join(sheet.extract_text() for sheet in paper.pages).split())
    for part in ("Energy and Langevin", "langevin_by_hand", "Stability needs", "Further reading"):
        assert part in text, part
    assert sum(len(sheet.images) for sheet in paper.pages) >= 7, "figures are missing"


def test_every_public_name_is_in_the_reference(site):
    """Each name of each public module has an entry of its own."""
    if "book/api/index.html" not in PAGES:
        pytest.skip("this build has no reference")
    import importlib
    import pkgutil

    import companion

    text = "".join(
        (SITE / path).read_text(encoding="utf-8") for path in PAGES if path.startswith("book/api/")
    )
    entries = set(re.findall(r'id="(companion\.[\w.]+)"', text))
    for found in pkgutil.walk_packages(companion.__path__, "companion."):
        if any(part.startswith("_") for part in found.name.split(".")) or found.ispkg:
            continue
        names = {f"{found.name}.{name}" for name in importlib.import_module(found.name).__all__}
        assert names <= entries, names - entries
