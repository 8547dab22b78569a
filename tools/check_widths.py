"""No page is wider than its window: each in a frame of a phone's width and of a desk's, in a headless browser.

    python tools/check_widths.py                  all pages of _docs
    python tools/check_widths.py FOLDER           all pages of another folder, such as one with reports of runs
    python tools/check_widths.py _docs a.html     some of them

Without Chromium or Chrome nothing is checked, and that is said.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "_docs"
WIDTHS = (390, 1280)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const holds = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
function sticksOut(e, edge) {                  // what an element between it and the page scrolls or hides, does not
  if (e.getBoundingClientRect().right <= edge + 1 || getComputedStyle(e).visibility === "hidden") return false;
  for (let p = e.parentElement; p && p !== e.ownerDocument.body; p = p.parentElement)
    if (holds(p) && p.getBoundingClientRect().right <= edge + 1) return false;
  return true;
}
async function look(page, widths) {
  const frame = document.createElement("iframe"), found = [];
  frame.style = `width:${widths[0]}px;height:900px;border:0`;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const doc = frame.contentDocument, root = doc.documentElement;
  for (const width of widths) {
    frame.style.width = `${width}px`;
    await new Promise(done => setTimeout(done, 30));
    const edge = root.clientWidth, worst = [...doc.body.querySelectorAll("*")].filter(e => sticksOut(e, edge)).pop();
    const over = Math.round(Math.max(root.scrollWidth, worst ? worst.getBoundingClientRect().right : 0) - edge);
    if (over <= 1) continue;                   // a page may clip what is too wide, so that its own width tells nothing
    const name = worst ? `${worst.tagName.toLowerCase()}.${worst.getAttribute("class")} ${worst.textContent.trim().slice(0, 60)}` : "";
    found.push({page, width, over, name});
  }
  frame.remove();
  return found;
}
(async () => {
  const {pages, widths} = await (await fetch("/widths.json")).json();
  let found = [];
  for (const page of pages) found = found.concat(await look(page, widths));
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})().catch(error => fetch("/found", {method: "POST", body: JSON.stringify(String(error))}));
</script>"""


class Handler(SimpleHTTPRequestHandler):
    "Pages of a folder, the page that looks at them, and what it finds."
    asked: dict = {}
    found = None
    done = threading.Event()

    def do_GET(self):
        said = {"/widths.html": HARNESS, "/widths.json": json.dumps(self.asked)}.get(self.path)
        if said is None: return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if self.path.endswith("json") else "text/html")
        self.end_headers()
        self.wfile.write(said.encode())

    def do_POST(self):
        Handler.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, *_): pass


def check(folder: Path, pages: list[str], browser: str, seconds: float = 1800) -> list[dict]:
    "Pages that overflow: page, width of the window, pixels too many, and the last element that sticks out."
    Handler.asked, Handler.found = {"pages": pages, "widths": WIDTHS}, None
    Handler.done.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [browser, "--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={home}",
                   f"--window-size={max(WIDTHS) + 100},1000", *(["--no-sandbox"] if os.geteuid() == 0 else []),
                   f"http://127.0.0.1:{server.server_port}/widths.html"]
        shown = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.time() + seconds
            while not Handler.done.wait(0.2):
                if shown.poll() is not None: raise SystemExit(f"{browser} ended with {shown.returncode}")
                if time.time() > end: raise SystemExit(f"{browser} did not look at all pages in {seconds:.0f} s")
        finally:
            shown.terminate()
            shown.wait(20)
            server.shutdown()
    if isinstance(Handler.found, str): raise SystemExit(f"{browser}: {Handler.found}")
    return Handler.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS, help="with pages (default: _docs)")
    parser.add_argument("pages", nargs="*", help="some of them (default: all)")
    args, start = parser.parse_args(), time.time()
    pages = args.pages or sorted(p.relative_to(args.folder).as_posix() for p in args.folder.rglob("*.html") if "site_libs" not in p.parts)
    if not pages: raise SystemExit(f"no pages in {args.folder}: build them first, python tools/build_site.py")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"skipped: the width of pages is checked in a browser, and none of {', '.join(BROWSERS)} is installed")
        return
    found = check(args.folder, pages, browser)
    if found:
        raise SystemExit("wider than their window:\n  " + "\n  ".join(
            f"{f['page']} at {f['width']} px: {f['over']} px too wide, {f['name']}" for f in found))
    print(f"{len(pages)} pages fit windows of {' and '.join(map(str, WIDTHS))} px ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
