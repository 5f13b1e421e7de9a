"""The page of a comparison in a real browser: Chromium, without a window, where it is installed."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from runs_on_disk import answers, experiment, write_run

import sborax as sx
from sborax.evaluate.compare import page
from sborax.evaluate.compare.groups import compare
from sborax.evaluate.compare.rows import read_rows
from sborax.evaluate.compare.spectra import Change, Weights

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
WIDTHS = (400, 1280)
METHODS = (
    sx.LoRA(rank=4), sx.LoRA(rank=4, alpha=8.0, rslora=True), sx.SBoRA(rank=4), sx.SBoRA(rank=4, variant="FB"),
    sx.Bone(rank=8), sx.DoRA(rank=4), sx.PiSSA(rank=4), sx.OLoRA(rank=4), sx.VeRA(rank=16), sx.HRA(rank=8), sx.IA3(),
    sx.SHiRA(rank=4),
)  # fmt: skip
MEASURE = """
<!DOCTYPE html><meta charset="utf-8"><body><iframe id="page" style="width: WIDTHpx; height: 3000px; border: 0"
srcdoc="PAGE"></iframe><pre id="answer"></pre><script>
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5 &&
  Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2.5;
document.getElementById("page").onload = event => {
  const inside = event.target.contentDocument, clashes = [], cut = [];
  let smallest = 100;
  for (const drawing of inside.querySelectorAll("svg")) {
    const frame = drawing.getBoundingClientRect(), label = drawing.getAttribute("aria-label");
    const texts = [...drawing.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect(),
      parseFloat(inside.defaultView.getComputedStyle(text).fontSize) * frame.width / drawing.viewBox.baseVal.width]);
    for (const [at, [text, box, size]] of texts.entries()) {
      smallest = Math.min(smallest, size);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
        cut.push([label, text]);
      for (const [other, place] of texts.slice(0, at)) if (overlap(box, place)) clashes.push([label, text, other]);
    }
  }
  const style = inside.defaultView.getComputedStyle(inside.body);
  document.getElementById("answer").textContent = JSON.stringify({clashes, cut, smallest,
    drawings: inside.querySelectorAll("svg").length, wide: inside.documentElement.scrollWidth,
    loaded: inside.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
    ink: style.color, paper: style.backgroundColor});
};
</script>
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A page of a dozen methods with three learning rates and two seeds, every kind of figure on it."""
    place, random = tmp_path_factory.mktemp("browsed"), np.random.default_rng(0)
    hard, runs = random.gamma(2.0, 1.0, 40), []
    for number, method in enumerate(METHODS):
        for lr in (1e-4, 1e-3, 1e-2):
            for seed in (0, 1):
                loss = 1.5 + 0.05 * number % 0.3 + 0.3 * abs(np.log10(lr) + 3) + 0.02 * random.normal()
                items, metrics = answers([bool(hit) for hit in random.binomial(1, 0.5, 40)], list(hard + 0.02 * number))
                trained, memory, seconds = 500 * (number + 1) ** 2, (30 - number) << 26, 0.01 * (1 + number % 5)
                costs = {"trained": trained, "memory": memory, "seconds": seconds}
                scores = {"scores": {"arc_easy": items}, "metrics": {"arc_easy": metrics}}
                described = experiment(method, lr, seed)
                runs.append(write_run(place / f"run{len(runs)}", described, float(loss), **costs, **scores))
    settings = compare(read_rows([str(run) for run in runs]))

    def change(layer, part):
        rows = np.arange(64) % 8 == layer if part else np.ones(64, bool)
        singular = np.sort(random.gamma(1.0, 0.01, 16))[::-1]
        return Change("layers/self_attn/q_proj", layer, 0.02, singular, 16, 1, rows, np.ones(64, bool))

    changes = {
        group.label: [change(layer, "SBoRA" in group.label) for layer in range(8)] for group in settings[0].groups
    }
    ranks = {settings[0].groups[0].label: {"layers/self_attn/q_proj": tuple(range(2, 10))}}
    return page.page(settings, [Weights(changes, ranks)])


def browse(text, place, width, dark):
    """What the browser makes of the page at this width."""
    file = place / f"measure{width}.html"
    file.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)))
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={place / 'profile'}",
    ]  # fmt: skip
    command = [str(CHROMIUM), *options, "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    answer = re.search(r'<pre id="answer">(.+?)</pre>', result.stdout, re.DOTALL)
    assert answer, result.stderr
    return json.loads(html.unescape(answer[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_legible(text, tmp_path, width):
    measured = browse(text, tmp_path, width, dark=False)
    assert measured["drawings"] > 40 and measured["wide"] <= width
    assert not measured["clashes"] and not measured["cut"]
    assert measured["smallest"] >= 8.0
    assert measured["loaded"] == []


def test_the_page_follows_the_scheme(text, tmp_path):
    schemes = [browse(text, tmp_path, 400, dark=dark) for dark in (False, True)]
    brightness = [
        [sum(map(int, re.findall(r"\d+", measured[part])[:3])) for part in ("ink", "paper")] for measured in schemes
    ]
    assert brightness[0][0] < 150 < 600 < brightness[0][1]
    assert brightness[1][0] > 600 > 150 > brightness[1][1]
