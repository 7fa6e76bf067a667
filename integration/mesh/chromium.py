"""A headless Chromium, driven over the DevTools protocol through a pair of pipes."""

import base64
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from .process import WITH_US, environment
from .wait import TEST_TIMEOUT, eventually

TOP = pathlib.Path(__file__).resolve().parents[2]
# What a page is asked, and how long the browser may take to answer on a busy machine.
ANSWER = 60


def chromium_binary():
    named = os.environ.get("CHROMIUM_BIN") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not named or not os.path.exists(named):
        pytest.skip("SKIPPED because there is no Chromium: install Debian's package chromium, or name the program in CHROMIUM_BIN")
    return named


def axe_script():
    """The text of axe-core, which finds what people with a screen reader or a keyboard can't use."""
    file = pathlib.Path(os.environ.get("AXE_JS") or TOP / ".cache/axe/package/axe.min.js")
    if not file.exists():
        pytest.skip("SKIPPED because there is no axe-core: run `npm pack axe-core`, unpack it, and name its axe.min.js in AXE_JS")
    return file.read_text()


class Chromium:
    def __init__(self, directory):
        binary = chromium_binary()
        ours, theirs = os.pipe(), os.pipe()
        self._to, self._from = ours[1], theirs[0]
        words = [binary, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={directory / 'chromium'}", "--no-first-run", "--disable-gpu",
                 "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 *(["--no-sandbox"] if os.getuid() == 0 else []), "about:blank"]
        # The browser reads from 3 and writes to 4, whatever these are here.
        moved = [sys.executable, "-c", f"import os, sys; os.dup2({ours[0]}, 3); os.dup2({theirs[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])", *words]
        self._log = open(directory / "chromium.log", "wb")
        self._process = subprocess.Popen([*WITH_US, *moved], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=(ours[0], theirs[1]),
                                         env=environment({"HOME": directory}), start_new_session=True)
        os.close(ours[0])
        os.close(theirs[1])
        self._numbers, self._read, self._answers, self._pages = itertools.count(1), b"", {}, {}

    def ask(self, method, session=None, **params):
        """The answer to a command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER
        while number not in self._answers:
            self._take(deadline, method)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _take(self, deadline, method):
        if not select.select([self._from], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"Chromium does not answer {method} within {ANSWER} s")
        got = os.read(self._from, 1 << 20)
        assert got, f"Chromium ended: {pathlib.Path(self._log.name).read_text(errors='replace')[-2000:]}"
        *messages, self._read = (self._read + got).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif page := self._pages.get(message.get("sessionId")):
                page.take_event(message["method"], message["params"])

    def page(self, url, **how):
        return Page(self, url, **how)

    def close(self):
        os.close(self._to)
        os.close(self._from)
        # Its helpers are in a session of their own with it.
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Page:
    def __init__(self, browser, url, width=1280, height=900, dark=False):
        self._browser, self.faults = browser, []
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser._pages[self._session] = self
        for domain in ("Page", "Runtime", "Log", "Audits"):
            self.ask(f"{domain}.enable")
        self.show_as(width, height, dark)
        self.ask("Page.navigate", url=url)
        eventually(lambda: self.run("document.readyState") == "complete", what=f"{url} is loaded")

    def ask(self, method, **params):
        return self._browser.ask(method, self._session, **params)

    def show_as(self, width, height=900, dark=False):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                                                         {"name": "prefers-reduced-motion", "value": "reduce"}])

    def take_event(self, event, about):
        """Errors as the browser's console shows them."""
        if event == "Runtime.exceptionThrown":
            self.faults.append(about["exceptionDetails"].get("exception", {}).get("description") or about["exceptionDetails"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.faults.append(f"console.{about['type']}: {[arg.get('value') for arg in about['args']]}")
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.faults.append(f"{about['entry']['source']}: {about['entry']['text']}")
        elif event == "Audits.issueAdded":
            self.faults.append(f"{about['issue']['code']}: {json.dumps(about['issue']['details'])[:600]}")

    def run(self, script):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector="body"):
        """The text of the page."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def press(self, key, code=0, text=None, modifiers=0):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers,
                     **({"text": text} if text and kind == "keyDown" else {}))

    def tab(self, back=False):
        self.press("Tab", 9, modifiers=8 if back else 0)

    def shot(self, file, whole=True):
        """A picture of the page, as PNG."""
        pathlib.Path(file).write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def unusable(self, axe):
        """Violations found by axe-core: [(rule, elements)]."""
        self.run(axe + "\n;true")
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + (n.any[0] || n.all[0] || n.none[0] || {}).message)]))")
        return [tuple(each) for each in found]
