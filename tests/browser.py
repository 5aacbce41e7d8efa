"""Pages laid out in a real browser, without its window."""

import html
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
)


def lay_out(pages, folder, *, theme, widths=(380, 1200)):
    """Lay pages out at some widths.

    Args:
        pages: HTML by name.
        folder: For the browser's own files.
        theme: light or dark, as the reader prefers it.
        widths: In pixels.

    Returns:
        By (name, width): how wide the content is, whether the dark theme is on, how many pictures failed; and what the
        browser complained of.
    """
    frames = "".join(
        f'<iframe id="{name}-{width}" width="{width}" height="900" style="color-scheme: {theme}" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in widths
    )
    probe = folder / "probe.html"
    probe.write_text(
        f'<!doctype html><meta charset="utf-8">{frames}<script>window.onload = () => {{ document.title = '
        "[...document.querySelectorAll('iframe')].map(f => { const w = f.contentWindow; return [f.id, "
        "w.document.documentElement.scrollWidth, w.matchMedia('(prefers-color-scheme: dark)').matches, "
        "[...w.document.images].filter(i => !i.complete || !i.naturalWidth).length].join() }).join(';') }</script>",
        encoding="utf-8",
    )
    done = run(["--dump-dom", "--virtual-time-budget=8000", f"file://{probe}"], folder, theme=theme)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    found = {}
    for item in title.group(1).split(";"):
        identity, wide, dark, broken = item.split(",")
        name, width = identity.rsplit("-", 1)
        found[name, int(width)] = (int(wide), dark == "true", int(broken))
    return found, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def run(arguments, folder, *, theme="light"):
    """Start the browser once."""
    scheme = f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", scheme, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
