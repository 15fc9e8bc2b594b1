"""Take the pictures of `docs/ui`: ``python docs/screenshots.py`` runs a small pipeline twice, opens the Prefect UI in Chromium and looks at it.

``--home FOLDER`` takes the runs of a folder in which the pipeline ran already. Needs Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent / "ui"
WIDTH, HEIGHT = 1280, 800
COLOURS = 96
"""Of a picture: enough for text and charts, and a third of the bytes."""
SMALL = {
    "curation.source.limit": 40,
    "curation.shard_inputs": 40,
    "curation.test": 0.3,
    "adaptation.steps": 40,
    "adaptation.previews": 2,
    "generation.prompts.count": 8,
    "generation.prompts.known_words": "false",
    "generation.cascade.steps": 12,
    "generation.chunk": 4,
    "evaluation.half_samples": 8,
    "evaluation.kid_subsets": 2,
    "evaluation.sheet_prompts": 3,
    "execution.price": 1.5,
}
"""A pipeline of some minutes."""
AGAIN = {"generation.prompts.count": 12}
"""What the second run wants otherwise: more prompts, of the same upsampler."""


def run_twice(home: Path) -> None:
    """The second run finds dataset and upsampler, so that its summary has stages that were skipped."""
    for settings in (SMALL, SMALL | AGAIN):
        options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        subprocess.run([sys.executable, "-m", "selfcascade_flows.cli", "run", *options], cwd=home, check=True)


@contextlib.contextmanager
def served(home: Path) -> Iterator[str]:
    """The URL of a Prefect server over the runs of ``home``, as `make ui` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    variables = {"PREFECT_HOME": str(home / ".selfcascade/prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_UI_API_URL": f"{url}/api"}
    arguments = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(arguments, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + 180
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/health", timeout=5):
                    break
                if time.monotonic() > end:
                    raise TimeoutError("the Prefect server does not answer")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()


def asked(url: str, path: str, body: dict[str, Any]) -> Any:
    """What the server's API answers."""
    request = urllib.request.Request(f"{url}/api{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def pages(url: str) -> dict[str, str]:
    """Name of a picture and the page that it shows: of the newest run of the pipeline, and of the newest artifact of a key that its runs made."""
    runs = asked(url, "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50, "flows": {"name": {"any_": ["pipeline"]}}})
    newest = {each["key"]: each["latest_id"] for each in asked(url, "/artifacts/latest/filter", {"limit": 200})}
    artifacts = {"summary": "run-summary", "table": "evaluate-demo", "sheet": "evaluate-demo-sheet"}
    run = f"{url}/runs/flow-run/{runs[0]['id']}"
    found = {"runs": f"{url}/runs", "run": run}
    return found | {name: f"{url}/artifacts/artifact/{newest[key]}" for name, key in artifacts.items()}


def photographed(page: Page, address: str) -> Image.Image:
    """What the browser shows once it has come to rest."""
    page.goto(address, wait_until="networkidle", timeout=120_000)
    if "/flow-run/" in address:
        page.get_by_text("Artifacts", exact=True).first.click()
    if address.endswith("/runs"):
        page.get_by_text("Items per page").scroll_into_view_if_needed()
        page.mouse.wheel(0, 500)  # past the chart, to the list
    page.wait_for_timeout(3000)  # the graph moves until it lies
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main() -> None:
    """Take every picture anew, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    given.out.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        home = given.home
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run_twice(home)
        url = stack.enter_context(served(home))
        chromium = stack.enter_context(sync_playwright()).chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        for name, address in pages(url).items():
            if not given.names or name in given.names:
                picture = photographed(page, address)
                picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(given.out / f"{name}.png", optimize=True)
        chromium.close()


if __name__ == "__main__":
    main()
