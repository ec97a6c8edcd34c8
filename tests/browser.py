"""A headless Chromium, driven as a person would: typing, clicking, looking. Debian's `chromium` and `chromium-driver`.

Owns: starting and ending it, and the few commands of the WebDriver protocol that tests need.
"""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=900,800",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER = "\ue007"


def why_not() -> str | None:
    """Why there is no browser here; None if there is one."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (apt-get install chromium chromium-driver)" if missing else None


class Page:
    """One tab. Elements are found by CSS selectors."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._session = client, session

    def go(self, url: str) -> None:
        self._post("url", url=url)

    def run(self, script: str) -> Any:
        """What a script in the page returns."""
        return self._post("execute/sync", script=script, args=[])

    def type(self, selector: str, text: str) -> None:
        self._post(f"element/{self._find(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self._post(f"element/{self._find(selector)}/click")

    def text(self, selector: str) -> str:
        return str(self._get(f"element/{self._find(selector)}/text"))

    def until(self, condition: str, seconds: float = 15.0) -> None:
        """Waits for a JavaScript expression to become true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} did not become true; the page says: {self.text('body')}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._get("screenshot")))

    def devtools(self, command: str, **params: Any) -> None:
        self._post("goog/cdp/execute", cmd=command, params=params)

    def log(self) -> list[str]:
        """What the page complained of."""
        return [str(entry["message"]) for entry in self._post("se/log", type="browser")]

    def _find(self, selector: str) -> str:
        return str(self._post("element", using="css selector", value=selector)[ELEMENT])

    def _get(self, path: str) -> Any:
        return _value(self._client.get(f"/session/{self._session}/{path}"))

    def _post(self, path: str, **body: Any) -> Any:
        return _value(self._client.post(f"/session/{self._session}/{path}", json=body))


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A fresh browser with a profile of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([str(shutil.which("chromedriver")), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            _wait_for(client)
            options = {"args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            started = _value(client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}))
            yield Page(client, started["sessionId"])
            client.delete(f"/session/{started['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(20)


def _wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            client.get("/status")
            return
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.05)


def _value(response: httpx.Response) -> Any:
    value = response.json()["value"]
    assert response.status_code == 200, value
    return value
