"""Pictures of web pages by a headless Chromium that is installed on the machine: the optional extra `web`.

Invariants: a page loads over http and https alone; a saved page besides takes files from the folder that it was given in, links resolved.
Each page has a context of its own (no cookie of one reaches another), a profile that is deleted with the browser, and a time limit over
everything; a browser that hangs is closed and started anew for the next page.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from stairstep.data import Roots
from stairstep.settings import InputError, TileError
from stairstep.tiles import decode_image

from .cutting import TileSize

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_TILES = 50
TIMEOUT_S = 60.0
# A page that goes on asking for things (a feed, a counter) is taken as it is after this long.
_SETTLE_MS = 3000
_CLOSE_S = 5.0
# Chromium repeats or loses what lies beyond 16,384 pixels of one screenshot.
_STRIP = 8192
_WIDEST = 4
_SCHEMES = ("http", "https", "data", "blob", "about")


def find_browser(path: Path | None) -> str:
    """The browser to drive; an InputError where it or the extra is missing."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        raise InputError(
            "web pages need the optional extra: pip install 'stairstep[web]' (playwright), and a Chromium on this machine; "
            "or leave the web pages out"
        ) from None
    found = shutil.which(path) if path is not None else next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        what = f"--browser {path}: this is no program" if path is not None else f"no browser is on PATH (looked for {', '.join(BROWSERS)})"
        raise InputError(f"{what}; install Chromium, or say where it is by --browser PATH")
    return found


class Browser:
    """A browser that takes pictures of pages, one at a time, while it is used in a `with` block."""

    def __init__(self, program: str, size: TileSize, max_pixels: int, timeout_s: float = TIMEOUT_S) -> None:
        self.program, self.size, self.max_pixels, self.timeout_s = program, size, max_pixels, timeout_s
        self._runner = asyncio.Runner()
        self._playwright: Any = None
        self._browser: Any = None

    def __enter__(self) -> Browser:
        from playwright.async_api import async_playwright

        self._playwright = self._runner.run(async_playwright().start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._runner.run(self._close())
            self._runner.run(self._playwright.stop())
        finally:
            self._runner.close()

    def picture(self, address: str, folder: Path | None) -> tuple[torch.Tensor, str | None]:
        """A page from top to bottom as uint8 [3, H, W], and a note where it was cut off; a TileError where it does not load.

        `folder` is for a saved page, the only kind whose address may be a file: the folder that it may take files from."""
        from playwright.async_api import Error

        try:
            return self._runner.run(self._picture(address, folder))
        except TimeoutError:
            self._runner.run(self._close())
            raise TileError(f"{address}: this page was not done within {self.timeout_s:g} s") from None
        except Error as error:
            raise TileError(f"{address}: this page cannot be loaded: {_why(error)}") from None

    async def _picture(self, address: str, folder: Path | None) -> tuple[torch.Tensor, str | None]:
        async with asyncio.timeout(self.timeout_s):
            browser = await self._started()
            view = {"width": self.size.width, "height": self.size.height}
            context = await browser.new_context(viewport=view, accept_downloads=False, service_workers="block")
            context.set_default_timeout(self.timeout_s * 1000)
        try:
            async with asyncio.timeout(self.timeout_s):
                page = await context.new_page()
                allowed = Roots([folder]) if folder is not None else None
                await context.route("**/*", lambda route: _guard(route, allowed))
                await self._load(page, address)
                return await self._strips(page, address)
        finally:
            try:
                await asyncio.wait_for(context.close(), _CLOSE_S)
            except TimeoutError:  # the page hangs, and its scripts would go on
                await self._close()

    async def _started(self) -> Any:
        if self._browser is not None and not self._browser.is_connected():
            self._browser = None
        if self._browser is None:
            from playwright.async_api import Error

            try:
                # Chromium refuses to run its sandbox as root (in a container, say), and would not start; anyone else has the sandbox.
                self._browser = await self._playwright.chromium.launch(executable_path=self.program, chromium_sandbox=os.geteuid() != 0)
            except Error as error:
                raise InputError(f"{self.program}: this browser does not start: {_why(error)}") from None
        return self._browser

    async def _close(self) -> None:
        browser, self._browser = self._browser, None
        if browser is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(browser.close(), _CLOSE_S)

    async def _load(self, page: Any, address: str) -> None:
        from playwright.async_api import TimeoutError as NotSettled

        response = await page.goto(address, wait_until="load")
        if response is not None and response.status >= 400:
            raise TileError(f"{address}: the server answered {response.status} {response.status_text}")
        with contextlib.suppress(NotSettled):
            await page.wait_for_load_state("networkidle", timeout=_SETTLE_MS)

    async def _strips(self, page: Any, address: str) -> tuple[torch.Tensor, str | None]:
        """The page in strips, joined; as wide as what it shows, as high as `MOST_TILES` tiles and `max_pixels` allow."""
        # Asked of the browser: what a page's own scripts say need not be a number.
        session = await page.context.new_cdp_session(page)
        content = (await session.send("Page.getLayoutMetrics"))["cssContentSize"]
        whole = (math.ceil(content["width"]), math.ceil(content["height"]))
        width = max(self.size.width, min(whole[0], self.size.width * _WIDEST))
        most = min(self.size.height * MOST_TILES * width // self.size.width, self.max_pixels // width)
        height = max(1, min(whole[1], most))
        strips = []
        for top in range(0, height, _STRIP):
            clip = {"x": 0, "y": top, "width": width, "height": min(_STRIP, height - top)}
            data = await page.screenshot(full_page=True, clip=clip, animations="disabled", scale="css")
            strips.append(decode_image(data, address, self.max_pixels))
        if len({strip.shape[2] for strip in strips}) > 1:
            raise TileError(f"{address}: this page changed its width while it was taken; import it again")
        note = f"cut off: {width}×{height} of {whole[0]}×{whole[1]} pixels" if whole[1] > height or whole[0] > width else None
        return torch.cat(strips, dim=1), note


def _why(error: Exception) -> str:
    """The first line of what playwright says, and the first complaint of the browser itself where it repeats one."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    return "; ".join([first, *[line.partition("[err]")[2].strip() for line in others if "[err]" in line][:1]])


async def _guard(route: Any, allowed: Roots | None) -> None:
    """Let a request pass, or break it off."""
    if may_load(route.request.url, allowed):
        await route.continue_()
    else:
        await route.abort()


def may_load(address: str, allowed: Roots | None) -> bool:
    """Whether a page may load from there: the web, the page itself, and for a saved page the files of its folder."""
    parts = urlsplit(address)
    if parts.scheme != "file":
        return parts.scheme in _SCHEMES
    path = unquote(parts.path)
    return allowed is not None and parts.netloc in ("", "localhost") and "\0" not in path and allowed.contains(os.path.realpath(path))
