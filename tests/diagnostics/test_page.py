"""The page in a browser, at the width of a telephone and of a desk. Debian's chromium, or any other of these names."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.diagnostics.measure import diagnose
from osdn.diagnostics.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here: apt-get update && apt-get install -y --no-install-recommends chromium"
)

# A browser's window has a least width, a frame has none. What is measured ends up in the title.
FRAME = """<!doctype html><title></title><body style="margin:0">
<iframe width="{width}" height="900" style="border:0" srcdoc="{page}" onload="
  const inside = this.contentDocument, root = inside.documentElement, images = [...inside.images];
  const wide = [...inside.querySelectorAll('*')].filter(x => !x.closest('.table'));
  document.title = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth,
    beyond: wide.filter(x => x.getBoundingClientRect().right > root.clientWidth + 0.5).map(x => x.tagName),
    images: images.length, drawn: images.filter(x => x.complete && x.naturalWidth > 0).length,
    captions: inside.querySelectorAll('figcaption').length, smallest: Math.min(...images.map(x => x.width)),
    text: parseFloat(getComputedStyle(inside.querySelector('figcaption')).fontSize)
  }})"></iframe>"""


def a_result(preset="osdn-apf", layers=3, tasks=("recall", "text")):
    torch.manual_seed(0)
    size = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": layers, "num_heads": 4, "head_dim": 4}
    model = OSDNForCausalLM(OSDNConfig.preset(f"{preset}-tiny", **size))
    measured = diagnose(model, {name: torch.randint(0, 20, (2, 40)) for name in tasks})
    here = {"checkpoint": "a/" + "very_long_name_" * 9, "date": "today", "device": "cpu", "commit": None}
    return {**here, "versions": {"torch": "2"}, **measured}


def seen(path, text, width):
    """What the browser measures in a frame of `width`, and what it says on its console."""
    frame = path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    flags += [f"--user-data-dir={path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    assert title[1], done.stderr
    return json.loads(html.unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_a_browser
@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser(width, tmp_path):
    sight, console = seen(tmp_path, page(a_result()), width)
    assert console == []
    assert sight["content"] <= sight["width"] <= width
    assert sight["beyond"] == []
    assert sight["images"] == sight["drawn"] == sight["captions"] == 1 + 2 * 8
    assert sight["smallest"] >= 330  # 4 inches, drawn at 9 points and more: legible from here on
    assert sight["text"] >= 14


@in_a_browser
def test_the_browser_notices_what_is_wrong(tmp_path):
    text = page(a_result(tasks=("recall",)))
    spoilt = text.replace("</body>", "<p style='width:600px'>x</p><script>console.error('oh')</script></body>")
    spoilt = spoilt.replace("base64,PD94", "base64,XXXX", 1)
    sight, console = seen(tmp_path, spoilt, 400)
    assert sight["content"] == 616
    assert sight["beyond"] == ["P"]
    assert sight["drawn"] == sight["images"] - 1
    assert "oh" in console[0]


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("osdn", "Over layers the median goes from 0 to "),
        ("static", "with the mean of d over features"),
        ("os-gdn", "stand at the lower bound of the box"),
        ("deltanet", "This checkpoint has no preconditioner"),
    ],
)
def test_what_the_page_says(preset, says):
    result = a_result(preset, layers=2, tasks=("<b>recall</b>",))
    text = page(result)
    assert says in text
    assert "<b>" not in text
    mean = sum(layer["all"]["ratio"] for layer in result["tasks"]["<b>recall</b>"]["layers"]) / 2
    assert f"A write leaves {mean:.3g} of its squared residual" in text
    assert text == page(result)
