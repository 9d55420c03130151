"""Chromium without a window, which sees this machine only."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

PROGRAMS = ("chromium", "chromedriver")

INSTALL = "make test-ui installs them, as root on Debian"

SECONDS = 120.0
"""no wait should last so long"""

T = TypeVar("T")


class Browser:
    """A new profile: nothing that anybody set up before."""

    def __init__(self, log: Path) -> None:
        options = ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        arguments = ["--headless=new", "--window-size=1600,1100", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en-US"]
        arguments += [
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--proxy-server=direct://",
            "--disable-background-networking",
        ]
        if os.getuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's own refuses to work for root
        for argument in arguments:
            options.add_argument(argument)
        self.chrome = Chrome(options, Service(shutil.which("chromedriver"), log_output=str(log)))

    def open(self, address: str) -> None:
        """The page anew, also where only what follows the # differs."""
        self.chrome.get("about:blank")
        self.chrome.get(address)

    def until(self, what: str, ask: Callable[[], T]) -> T:
        """What `ask` answers, once that is something. A page that changes while it is read is read again."""
        deadline, last = time.monotonic() + SECONDS, ""
        while True:
            try:
                if answer := ask():
                    return answer
            except WebDriverException as error:
                last = str(error.msg)
            shown = "" if time.monotonic() < deadline else self.chrome.find_element(By.TAG_NAME, "body").text
            assert not shown, f"waited in vain for {what} at {self.chrome.current_url} {last}; the page says: {shown}"
            time.sleep(0.5)  # the page has the same cores

    def all(self, css: str) -> list[WebElement]:
        """The elements there are now."""
        return self.chrome.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        """What such elements say, read in one go: a table is drawn anew while it is read."""
        return [
            text
            for text in self.script("return Array.from(document.querySelectorAll(arguments[0])).map(e => e.innerText.trim())", css)
            if text
        ]

    def click(self, css: str, text: str | None = None) -> None:
        """The innermost such element, of this very text, as soon as it is there and can be clicked."""

        def clicked() -> bool:
            found = [element for element in self.all(css) if element.is_displayed() and text in (None, element.text.strip())]
            if found:
                found[-1].click()
            return bool(found)

        self.until(f"{css} of text {text!r} to click", clicked)

    def says(self, text: str) -> None:
        """Waits until the page, or the frame that is looked into, shows a text."""
        self.until(f"{text!r}", lambda: text in self.chrome.find_element(By.TAG_NAME, "body").text)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(code, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.chrome.quit()
