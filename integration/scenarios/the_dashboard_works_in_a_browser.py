"""The dashboard in a real browser: live, in words, without a fault, on small screens, without a mouse, and for people who don't see it."""

import contextlib
import json
import re
import threading

import pytest

from mesh import ask, eventually
from mesh.chromium import Chromium, axe_script
from mesh.service import admin_port

# Whatever a key can reach.
REACHABLE = "a[href], button, input, select, summary, [tabindex='0']"


@pytest.fixture
def chromium(tmp_path):
    with Chromium(tmp_path) as browser:
        yield browser


@pytest.fixture
def middle(mesh):
    """A sidecar with callers, upstreams of both kinds, a router, and someone whom it denies."""
    tax, ledger = mesh.web("tax"), mesh.service("ledger")
    mesh.agent.write("service-router", tax.name, Routes=[{"Match": {"HTTP": {"PathPrefix": "/v2"}}, "Destination": {"RequestTimeout": "3s"}}])
    invoice = mesh.web("invoice", [tax, ledger])
    order, batch = mesh.service("order", [invoice], app=None), mesh.service("batch", [invoice], app=None)
    mesh.allow(order, invoice)
    for caller, to in ((order, invoice), (batch, invoice), (invoice, tax)):
        eventually(lambda: ask(caller.port_to(to)).status == 200)
    invoice.eventually_reaches(ledger)
    mesh.tax, mesh.ledger, mesh.invoice, mesh.order, mesh.batch = tax, ledger, invoice, order, batch
    mesh.address = f"http://127.0.0.1:{admin_port(invoice.process)}/"
    return mesh


@contextlib.contextmanager
def traffic(*ports):
    """Requests one after the other, meanwhile."""
    is_over = threading.Event()

    def run():
        while not is_over.wait(0.02):
            for port in ports:
                with contextlib.suppress(OSError):
                    ask(port)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def loaded(chromium, mesh, **how):
    page = chromium.page(mesh.address, **how)
    eventually(lambda: page.text("#live") == "live" and page.text("#title") == mesh.invoice.name, 40, "the page has its first state")
    return page


def shows(page, text, where="body", within=40):
    eventually(lambda: text in page.text(where), within, f"{where} shows {text!r}", every=0.1)


def explain(page, **fields):
    page.run(f"""(() => {{ const form = document.querySelector('#explain');
        for (const [name, value] of Object.entries({json.dumps(fields)})) form.elements[name].value = value;
        form.requestSubmit(); }})()""")


def test_it_is_live_and_shows_a_denial_when_it_happens(middle, chromium):
    page = loaded(chromium, middle)
    for part, texts in {
        "#callers": [middle.order.name, middle.batch.name], "#self": [middle.invoice.name, "valid for"], "#called": [middle.tax.name, middle.ledger.name, "1 instance"],
        "#upstreams": [f"127.0.0.1:{middle.tax.public}", "healthy"], "#intentions": [middle.order.name, "allow"], "#certificate": [f"/svc/{middle.invoice.name}"],
    }.items():
        for text in texts:
            shows(page, text, part)
    requests = lambda: int(page.run("document.querySelector('#self .figures:nth-of-type(2) b').textContent.replace(/,/g, '')"))  # noqa: E731
    before = requests()
    with traffic(middle.order.port_to(middle.invoice), middle.invoice.port_to(middle.tax)):
        # As it happens, and not when the page is loaded again.
        eventually(lambda: requests() > before, 40, "the number of requests grows", every=0.1)
        eventually(lambda: page.run("[...document.querySelectorAll('#called .node')].some(node => Number(node.dataset.rate) > 0)"), 40, every=0.1)
        assert page.run("document.querySelectorAll('#edges path').length") == 2 * 4
        # Of the requests of the last minute, of which there was none when the page was loaded.
        for part in ("#self", "#called"):
            eventually(lambda part=part: re.search(r"p50 [0-9.]+ ms p99 [0-9.]+ ms", " ".join(page.text(part).split())), 40, f"{part} has latencies", every=0.1)
    assert middle.batch.name not in page.text("#verdict")
    middle.deny(middle.batch, middle.invoice)
    eventually(lambda: ask(middle.batch.port_to(middle.invoice), "/secret").status == 403)
    # The first one may have been under way when the deny came, which ends it and is no decision about a request.
    assert ask(middle.batch.port_to(middle.invoice), "/secret").status == 403
    rule = f"intention {middle.batch.name} => {middle.invoice.name} (deny"
    shows(page, f"{middle.batch.name} is being denied.", "#verdict")
    shows(page, f"{middle.batch.name} to {middle.invoice.name}: GET /secret", "#events")
    assert rule in page.text("#events") and "What to do:" in page.text("#events") and rule in page.text("#verdict")
    # And what it cannot reach.
    middle.tax.passing("fail")
    eventually(lambda: ask(middle.invoice.port_to(middle.tax)).status == 503)
    shows(page, f"{middle.tax.name} has no usable instance.", "#verdict")
    assert page.run("document.querySelector('#verdict').getAttribute('aria-live')") == "polite" and "(" in page.run("document.title")
    middle.tax.passing()
    eventually(lambda: f"{middle.tax.name} has no usable instance." not in page.text("#verdict"), 40, every=0.1)
    assert page.faults == []


def test_it_draws_the_route_of_a_request(middle, chromium):
    page = loaded(chromium, middle)
    explain(page, upstream=middle.tax.name, path="/v2/x")
    for text in ("GET /v2/x", "route 1 of", "3s", f"127.0.0.1:{middle.tax.public}"):
        shows(page, text, "#route")
    # What is wrong is said, too, and is no markup.
    explain(page, header="<b>x</b>: 1")
    shows(page, "is no name of a header", "#route")
    assert page.run("document.querySelectorAll('#route b').length") == 0
    # The browser itself tells of the status.
    assert all("400 (Bad Request)" in fault for fault in page.faults), page.faults


def test_it_says_so_when_the_sidecar_is_gone(middle, chromium):
    page = loaded(chromium, middle)
    middle.invoice.process.kill()
    shows(page, "not connected", "#live")


def test_everybody_can_use_it(middle, chromium):
    axe = axe_script()
    middle.deny(middle.batch, middle.invoice)
    eventually(lambda: ask(middle.batch.port_to(middle.invoice), "/" + "long" * 50).status == 403)
    middle.tax.passing("fail")
    eventually(lambda: ask(middle.invoice.port_to(middle.tax)).status == 503)
    page = loaded(chromium, middle)
    shows(page, "Denied", "#events")
    explain(page, upstream=middle.tax.name)
    shows(page, "no usable instance", "#route")
    for width, dark in ((1280, False), (1280, True), (360, False), (360, True)):
        page.show_as(width, dark=dark)
        # Nothing is to be pushed sideways.
        assert page.run("document.documentElement.scrollWidth") <= width, page.run("""[...document.querySelectorAll('body *')]
            .filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 200))""")
        assert page.unusable(axe) == [], (width, dark)
    reaches_everything(page)
    assert page.faults == []
    # It would have been found.
    page.run("document.querySelector('main').append(new Image())")
    assert [rule for rule, _ in page.unusable(axe)] == ["image-alt"]


def reaches_everything(page):
    """The tab key comes to all that can be used, in the order of the page, and each is seen to have the focus; and the page's news take it from none."""
    page.run("document.activeElement.blur()")
    wanted = page.run(f"[...document.querySelectorAll({json.dumps(REACHABLE)})].filter(each => each.checkVisibility()).map(each => each.outerHTML)")
    assert len(wanted) >= 10
    reached = []
    for _ in wanted:
        page.tab()
        reached.append(page.run("document.activeElement.outerHTML"))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none" and page.run("document.activeElement.getBoundingClientRect().width") > 0, reached[-1]
    assert reached == wanted
    page.run("document.querySelector('#explain input').focus()")
    seen = page.run("new Promise(done => { let states = 0; stream.addEventListener('message', () => { if (++states === 2) done(document.activeElement.name); }); })")
    assert seen == "method"
    # Return sends the form.
    page.run("document.querySelector('#explain input[name=path]').value = '/typed'")
    page.press("Enter", 13, "\r")
    shows(page, "/typed", "#route")


