"""The Langevin playground in the built book, in headless Chromium: its arithmetic, its controls, its manners.

Its functions are asked through ``window.langevinPlayground.core``. Every random number comes from a seed, so
a measured quantity is the same in every run; the margins are what its error bar allows.
"""

import json
import math

import numpy as np
import pytest
import test_pages
import torch
from scipy import stats
from test_pages import SITE, VIEWPORTS, Visit

from companion import energies, langevin

PAGE = "book/energy-and-langevin.html"
LANDSCAPES = {
    "quadratic": energies.Gaussian(torch.zeros(1), torch.ones(1)),
    "double well": energies.DoubleWell(dim=1),
    "ring": energies.GaussianMixture.ring(),
}
STEPS = (0.5, 1.0, 1.4, 1.8)
# n particles walk; back come, as JSON, which is quicker than Playwright's own way for long lists, the last
# states and the acceptance averaged over the steps.
WALK = """({name, adjusted, eps, T, n, steps, seed}) => {
    const {core} = langevinPlayground, landscape = core.landscapes[name], source = core.random(seed);
    let x = new Float64Array(n * landscape.dim).map((_, j) => landscape.birth[j % landscape.dim]);
    let acceptance = 0;
    for (let k = 0; k < steps; k++) {
        const moved = core[adjusted ? 'mala' : 'step'](landscape, x, eps, T, source);
        x = moved.x;
        acceptance += moved.acceptance / steps;
    }
    return JSON.stringify({x: [...x], acceptance});
}"""
INSTANCE = "langevinPlayground.instances[0]"
LOOK = "() => document.querySelector('.langevin-playground canvas').toDataURL()"
site, browser = test_pages.site, test_pages.browser


def walk(page, name, adjusted, eps, T, n, steps, seed=1):
    arguments = {"name": name, "adjusted": adjusted, "eps": eps, "T": T, "n": n, "steps": steps, "seed": seed}
    done = json.loads(page.evaluate(WALK, arguments))
    return np.array(done["x"]).reshape(n, -1), done["acceptance"]


def age(page):
    return page.evaluate(f"{INSTANCE}.simulation.age")


def into_view(page):
    page.locator(".langevin-playground canvas").scroll_into_view_if_needed()


class Opened(Visit):
    """The chapter's page, without its mathematics, which takes seconds to set and has tests of its own."""

    def __init__(self, browser, site, size, **media):
        if not (SITE / PAGE).is_file():
            test_pages.unavailable(f"the book in {SITE} has no page {PAGE}")
        super().__init__(browser, site, size)
        self.page.emulate_media(**media)
        self.page.route("**/mathjax/*.js", lambda route: route.fulfill(body=""))
        self.page.goto(f"{site}/{PAGE}", wait_until="load")


@pytest.fixture
def visit(browser, site):
    with Opened(browser, site, VIEWPORTS["desktop"]) as visit:
        yield visit
        assert not visit.problems


@pytest.fixture(scope="module")
def core(browser, site):
    """The page, for the tests that only compute."""
    with Opened(browser, site, VIEWPORTS["desktop"], reduced_motion="reduce") as visit:
        yield visit.page


# --- arithmetic -----------------------------------------------------------------------------------


def test_random_numbers_are_standard_normal_and_uniform(core):
    draw = """kind => JSON.stringify(
        Array.from({length: 50000}, langevinPlayground.core.random(3)[kind]))"""
    normal, uniform = (json.loads(core.evaluate(draw, kind)) for kind in ("normal", "uniform"))
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    # The two that Box and Muller make of one radius and one angle do not lean on each other.
    assert abs(np.corrcoef(np.reshape(normal, (-1, 2)).T)[0, 1]) < 3 / math.sqrt(25_000)
    first = "seed => langevinPlayground.core.random(seed).normal()"
    assert core.evaluate(first, 1) == core.evaluate(first, 1) != core.evaluate(first, 2)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_energies_and_gradients_are_the_chapter_s(core, name):
    energy = LANDSCAPES[name]
    x = 3 * torch.randn(50, energy.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ask = """([name, x]) => {
        const landscape = langevinPlayground.core.landscapes[name], grad = new Float64Array(x.length);
        const value = Array.from({length: x.length / landscape.dim}, (_, i) => landscape.energy(x, i, grad));
        return [value, [...grad]];
    }"""
    value, grad = core.evaluate(ask, [name, x.flatten().tolist()])
    torch.testing.assert_close(torch.tensor(value).double(), energy(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(grad).double().reshape(x.shape), energies.gradient(energy, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("T", [0.5, 1.0])
@pytest.mark.parametrize("eps", STEPS)
def test_variance_on_the_quadratic(core, eps, T):
    """Unadjusted: eps^2 / (1 - a^2), within three standard errors; adjusted: T. The start is forgotten."""
    eps, n = eps * math.sqrt(T), 40_000
    steps = max(60, math.ceil(20 * T / eps**2))
    a = 1 - eps**2 / (2 * T)
    closed = eps**2 / (1 - a**2)
    ask = """([eps, T]) => {
        const {core} = langevinPlayground;
        return core.unadjustedVariance(core.landscapes.quadratic, eps, T);
    }"""
    assert core.evaluate(ask, [eps, T]) == pytest.approx(closed) == pytest.approx(T / (1 - eps**2 / (4 * T)))
    unadjusted, _ = walk(core, "quadratic", False, eps, T, n, steps)
    adjusted, _ = walk(core, "quadratic", True, eps, T, n, steps)
    assert abs(unadjusted.var() / closed - 1) < 3 * math.sqrt(2 / n)
    assert abs(adjusted.var() / T - 1) < 3 * math.sqrt(2 / n)
    assert abs(unadjusted.var() / T - 1) > 3 * math.sqrt(2 / n)  # the difference could be seen


def density(page, name, T):
    ask = """([name, T]) => {
        const {core} = langevinPlayground, {nodes, p, variance} = core.density(core.landscapes[name], T);
        return JSON.stringify({nodes: [...nodes], p: [...p], variance});
    }"""
    found = json.loads(page.evaluate(ask, [name, T]))
    return np.array(found["nodes"]), np.array(found["p"]), found["variance"]


@pytest.mark.parametrize("name", ["quadratic", "double well"])
@pytest.mark.parametrize("T", [0.2, 1.0, 4.0])
def test_density_in_one_dimension(core, name, T):
    nodes, p, variance = density(core, name, T)
    u = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    exact = (-LANDSCAPES[name](u[:, None]) / T).exp()
    exact /= torch.trapezoid(exact, u)
    np.testing.assert_allclose(p, np.interp(nodes, u, exact), atol=1e-4 * p.max())
    assert variance == pytest.approx(torch.trapezoid(exact * u**2, u).item(), rel=1e-6)


def test_density_in_the_plane(core):
    """At T = 1 the first coordinate of the ring is a mixture of eight Gaussians in one dimension."""
    nodes, p, variance = density(core, "ring", 1.0)
    centres = 2 * np.cos(np.arange(8) * math.pi / 4)
    np.testing.assert_allclose(p, stats.norm.pdf(nodes[:, None], centres, 0.25).mean(1), atol=1e-6)
    assert variance == pytest.approx(2**2 / 2 + 0.25**2)


def test_histogram_on_the_double_well(core):
    """Independent particles after many crossings, T = 2, counted against the exact density: chi-squared."""
    n, T = 4000, 2.0
    x, _ = walk(core, "double well", True, 0.3, T, n, 1200)
    count = """x => {
        const {core} = langevinPlayground;
        return [...core.histogram(core.landscapes['double well'], JSON.parse(x))];
    }"""
    bars, bins = np.array(core.evaluate(count, json.dumps(x[:, 0].tolist()))), 60
    assert bars.sum() * 4 / bins == pytest.approx(
        np.mean(np.abs(x) < 2)
    )  # a density: its bars cover the mass
    nodes, p, _ = density(core, "double well", T)
    edges = np.linspace(-2, 2, bins + 1)
    mass = np.diff(
        np.interp(edges, nodes, np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * np.diff(nodes))]))
    )
    seen, expected = bars * n * 4 / bins, mass * n
    enough = expected > 5
    chi_squared = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert enough.sum() > 40
    assert stats.chi2.sf(chi_squared, enough.sum()) > 0.01
    unmixed, _ = walk(core, "double well", True, 0.1, 0.3, 500, 300)  # cold: nobody has crossed
    assert (unmixed < 0).all()


@pytest.mark.parametrize(
    ("name", "T", "tried"),
    [
        ("quadratic", 1.0, (0.3, 0.7, 1.0, 1.4, 1.8, 2.4)),
        ("double well", 0.5, (0.05, 0.15, 0.3)),
        ("ring", 2.0, (0.1, 0.3, 0.6)),
    ],
)
def test_acceptance_is_the_companion_s(core, name, T, tried):
    """The same births, steps and step sizes; 60 steps of 3000 particles average to better than 0.002."""
    energy = LANDSCAPES[name]
    birth = core.evaluate("name => langevinPlayground.core.landscapes[name].birth", name)
    start = torch.tensor(birth, dtype=torch.float32).expand(3000, -1)
    found = []
    for eps in tried:
        _, rate = walk(core, name, True, eps, T, 3000, 60)
        generator = torch.Generator().manual_seed(0)
        chain = langevin.mala(energy, start, 60, eps, temperature=T, generator=generator)
        assert rate == pytest.approx(chain.gauges.acceptance.item(), abs=0.008)
        found.append(rate)
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9 > 0.75 > found[-1]


# --- the element ----------------------------------------------------------------------------------


@pytest.mark.parametrize("viewport", VIEWPORTS)
def test_it_moves(browser, site, viewport):
    width = VIEWPORTS[viewport][0]
    with Opened(browser, site, VIEWPORTS[viewport]) as visit:
        page = visit.page
        for name in LANDSCAPES:
            page.get_by_label("Landscape").select_option(name)
            into_view(page)
            page.wait_for_function(f"{INSTANCE}.simulation.age > 5")
            before = page.evaluate(LOOK)
            # From where it is now: on a busy machine the first look can come after any fixed age.
            seen = page.evaluate(f"{INSTANCE}.simulation.age")
            page.wait_for_function(f"{INSTANCE}.simulation.age > {seen + 15}")
            assert page.evaluate(LOOK) != before
            drawn = "() => document.querySelector('.langevin-playground canvas').width / devicePixelRatio"
            box = page.locator(".langevin-playground canvas").bounding_box()
            assert page.evaluate(drawn) == pytest.approx(box["width"], abs=1)
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert not visit.problems


def test_sliders_by_keyboard(visit):
    page = visit.page
    before = page.evaluate(f"({{...{INSTANCE}.settings}})")
    page.get_by_label("Step size").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")  # the temperature comes next
    after = page.evaluate(f"({{...{INSTANCE}.settings}})")
    assert after["eps"] == pytest.approx(before["eps"] + 0.05)
    assert (before["T"], after["T"]) == (1, 0.7)
    for name in ("eps", "T"):
        assert page.evaluate(f"{INSTANCE}.simulation.{name}") == after[name]
    assert page.locator(".langevin-playground output").all_text_contents() == ["1.05", "0.7"]
    assert page.get_by_label("Temperature").get_attribute("aria-valuetext") == "0.7"
    tiles = page.locator(".langevin-playground dd").all_text_contents()
    assert tiles[1:3] == ["0.700", f"{0.7 / (1 - 1.05**2 / 2.8):.3f}"]


def test_every_control_has_a_name(visit):
    page = visit.page
    nameless = """() => [...document.querySelectorAll('.langevin-playground :is(input, select, button)')]
        .filter(e => !(e.labels?.length ? e.labels[0].textContent : e.textContent).trim()).length"""
    assert page.locator(".langevin-playground :is(input, select)").count() == 6
    assert page.evaluate(nameless) == 0
    assert page.locator(".langevin-playground canvas").get_attribute("aria-label")


def test_buttons_and_the_same_start_twice(visit):
    page = visit.page
    into_view(page)
    page.wait_for_function(f"{INSTANCE}.simulation.age > 5")
    pause = page.get_by_role("button", name="Pause")
    pause.focus()
    page.keyboard.press("Space")
    stopped = age(page)
    page.wait_for_timeout(300)
    assert age(page) == stopped
    page.get_by_role("button", name="Step", exact=True).click()
    assert age(page) == stopped + 1
    ends = []
    for _ in range(2):
        page.get_by_role("button", name="Restart").click()
        assert age(page) == 0
        page.get_by_role("button", name="100 steps").click()
        assert age(page) == 100
        ends.append(page.evaluate(f"[...{INSTANCE}.simulation.x]"))
    assert ends[0] == ends[1] and len(set(ends[0])) == 300
    page.get_by_role("button", name="Run").click()
    page.wait_for_function(f"{INSTANCE}.simulation.age > 110")


def test_running_averages_settle(visit):
    """What the tiles show: variance and acceptance of a long adjusted run, counted while it walks."""
    page = visit.page
    page.get_by_label("Chain").select_option("adjusted")
    page.get_by_label("Particles", exact=True).select_option("1000")
    shown = """() => { const it = langevinPlayground.instances[0]; it.jump(600);
        return [it.simulation.square - it.simulation.mean ** 2, it.simulation.acceptance]; }"""
    variance, acceptance = page.evaluate(shown)
    tiles = page.locator(".langevin-playground dd").all_text_contents()
    assert (tiles[0], tiles[4]) == (f"{variance:.3f}", f"{acceptance:.3f}")
    assert variance == pytest.approx(1, abs=0.02)
    reference = langevin.mala(LANDSCAPES["quadratic"], torch.randn(4000, 1), 100, 1.0).gauges.acceptance
    assert acceptance == pytest.approx(reference.item(), abs=0.01)


def test_an_unstable_step_is_reported_and_left_behind(visit):
    page = visit.page
    into_view(page)
    message = page.locator(".langevin-playground [role=status]")
    assert message.text_content() == ""
    page.get_by_label("Step size").focus()
    page.keyboard.press("End")
    page.wait_for_function(f"{INSTANCE}.simulation.lost")
    page.wait_for_function("document.querySelector('.pg-message').textContent.startsWith('Diverged at step')")
    assert "stable limit 2.00" in message.text_content()
    assert page.locator(".langevin-playground dd").all_text_contents()[:3] == ["lost", "1.000", "none"]
    page.get_by_label("Chain").select_option("adjusted")  # any step will do for this one
    into_view(page)
    page.wait_for_function(f"{INSTANCE}.simulation.age > 200")
    assert message.text_content() == "" and not page.evaluate(f"{INSTANCE}.simulation.lost")
    page.get_by_label("Chain").select_option("unadjusted")
    page.wait_for_function(f"{INSTANCE}.simulation.lost")
    page.get_by_label("Step size").focus()
    page.keyboard.press("Home")
    assert message.text_content() == "" and not page.evaluate(f"{INSTANCE}.simulation.lost")


@pytest.mark.parametrize(("name", "eps"), [("double well", 0.6), ("ring", 0.7)])
def test_the_other_landscapes_report_it_too(visit, name, eps):
    page = visit.page
    page.get_by_label("Landscape").select_option(name)
    page.evaluate(f"{INSTANCE}.set('eps', {eps}); {INSTANCE}.jump(2000)")
    assert page.locator(".langevin-playground [role=status]").text_content().startswith("Diverged at step")


def test_paused_where_motion_is_unwelcome(browser, site):
    with Opened(browser, site, VIEWPORTS["desktop"], reduced_motion="reduce") as visit:
        page = visit.page
        into_view(page)
        page.wait_for_function(f"{INSTANCE}.visible")
        page.wait_for_timeout(300)
        assert age(page) == 0
        page.get_by_role("button", name="Run").click()  # on request it moves all the same
        page.wait_for_function(f"{INSTANCE}.simulation.age > 5")
        assert not visit.problems


def test_it_rests_out_of_sight(visit):
    page = visit.page
    into_view(page)
    page.wait_for_function(f"{INSTANCE}.simulation.age > 5")
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_function(f"!{INSTANCE}.visible")
    stopped = age(page)
    page.wait_for_timeout(300)
    assert age(page) <= stopped + 10  # a frame may have been under way
    stopped = age(page)
    page.wait_for_timeout(300)
    assert age(page) == stopped


def test_the_summary_is_spoken_seldom(visit):
    page = visit.page
    into_view(page)
    page.evaluate("""() => {
        window.spoken = 0;
        const summary = document.querySelector('.langevin-playground [aria-live]');
        new MutationObserver(() => { window.spoken += 1; }).observe(summary, {childList: true});
    }""")
    page.get_by_label("Temperature").press("ArrowRight")
    page.wait_for_timeout(2000)
    assert 1 <= page.evaluate("window.spoken") <= 2
    said = page.locator(".langevin-playground [aria-live]").text_content()
    assert said.startswith("Running. ") and "variance, exact p: 1.500" in said


def test_dark_mode_recolours_the_picture(visit):
    page = visit.page
    page.evaluate(f"{INSTANCE}.jump(50)")
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    page.wait_for_timeout(100)
    light = page.evaluate(LOOK)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(100)
    assert page.evaluate(LOOK) != light
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    page.wait_for_timeout(100)
    assert page.evaluate(LOOK) == light


def test_the_picture_stands_in_on_paper_and_without_scripts(visit, browser, site):
    page = visit.page
    playground, still = page.locator(".langevin-playground"), page.locator(".tag_playground-still")
    assert still.count() == 1 and still.locator("img").get_attribute("alt")
    assert playground.is_visible() and not still.is_visible()
    page.emulate_media(media="print")
    assert still.is_visible() and not playground.is_visible()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/{PAGE}")
    assert page.locator(".tag_playground-still").is_visible()
    assert not page.locator(".langevin-playground").is_visible()
    context.close()
