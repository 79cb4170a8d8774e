"""A page in headless Chromium: what its console says, and what it asks the network for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CONSOLE = re.compile(r':CONSOLE:\d+\] "(.*)", source:')


@dataclass(frozen=True)
class Visit:
    """What a visit of a page showed.

    Args:
        dom: The page after its scripts have run.
        console: Everything it printed to the console, errors included.
        requests: Everything it asked for over the network; what the browser does for itself is left out.
    """

    dom: str
    console: list[str]
    requests: list[str]


def chromium() -> str:
    """Return the browser; the tests cannot do without one."""
    names = [os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "the tests open the report in Chromium: install it (make test does), or set CHROME to a browser"
    return found


def visit(page: Path, folder: Path, *, width: int = 1280) -> Visit:
    """Open a page and let its scripts run."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", f"--window-size={width},1600",
            "--virtual-time-budget=5000", f"--log-net-log={log}", "--dump-dom", page.absolute().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # What the browser starts by itself, such as looking for updates, has no origin.
    requests = [params["url"] for params in asked if params["initiator"] != "not an origin"]
    return Visit(done.stdout, _CONSOLE.findall(done.stderr), requests)
