"""Where a web server may send the reader on to: hubs hand out files from other hosts, but nobody hands out ours.

A redirect from a public host to this machine or its network would make the reader ask what only it can reach: a
cloud's metadata service, say. One from https to http would show to anybody what is fetched.
"""

import asyncio
import ipaddress
import socket
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin, urlsplit


class Redirected(Exception):
    """A server sent the reader where it does not go; the text is the cause, in words."""


def check_redirect(here: str, there: str) -> None:
    """Raises Redirected unless a server at the address `here` may send a reader on to `there`. Asks for names."""
    old, new = urlsplit(here), urlsplit(urljoin(here, there))
    if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
        raise Redirected(f"it redirects from {old.scheme}:// to {new.scheme}://")
    if new.hostname != old.hostname and _is_private(new.hostname) and not _is_private(old.hostname):
        raise Redirected("it redirects to an address of this machine or of its own network")


@lru_cache(maxsize=1)  # one object: fsspec keeps a client for each that it sees
def guarded() -> dict[str, Any]:
    """Arguments for an aiohttp session that follows no other redirects."""
    from aiohttp import TraceConfig

    async def on_redirect(_: Any, context: SimpleNamespace, parameters: Any) -> None:
        headers = parameters.response.headers
        there = headers.get("Location") or headers.get("URI") or ""
        await asyncio.to_thread(check_redirect, str(parameters.response.url), there)

    trace = TraceConfig()
    trace.on_request_redirect.append(on_redirect)
    return {"trace_configs": [trace]}


def _is_private(host: str | None) -> bool:
    """Whether any address of this name is not of the public internet; a name without one leads nowhere."""
    try:
        found = socket.getaddrinfo(host or "", None)
    except (OSError, UnicodeError):
        return False
    return any(not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)
