"""The page in a browser: wide and narrow, light and dark. Skipped where no browser is installed."""

import shutil

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers

pytestmark = pytest.mark.one_backend("a page is of NumPy arrays")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LONG = "an_unusually_long_name_of_a_layer_that_has_no_room_on_a_phone_at_all"

# What sticks out of the window and cannot be scrolled to within a part of its own.
STICKING_OUT = """() => {
  const scrolls = element => element && (
    ["auto", "scroll"].includes(getComputedStyle(element).overflowX)
    || scrolls(element.parentElement));
  return [...document.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
    && !scrolls(element.parentElement)).map(element => element.outerHTML.slice(0, 80));
}"""
# The least contrast of a text with the page, as WCAG 2 defines it.
CONTRASTS = """() => {
  const light = text => {
    const parts = text.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255).map(
      part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const back = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? back(element.parentElement) : colour;
  };
  return [...document.querySelectorAll("h1, h2, p, th, td, td span, small, dt, dd, figcaption")]
    .filter(element => element.textContent.trim()).map(element => {
      const pair = [light(getComputedStyle(element).color), light(back(element))].sort(
        (first, second) => second - first);
      return (pair[0] + 0.05) / (pair[1] + 0.05);
    });
}"""
# A row's head leaves room for what the row says.
WIDTHS = "list => list.map(one => one.getBoundingClientRect().width)"
PICTURES = "list => list.map(one => [one.alt, one.naturalWidth, one.getBoundingClientRect().width])"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev`")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program)
        yield running
        running.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The pages of a model of images and of one of texts, with every kind of part."""
    folder = tmp_path_factory.mktemp("reports")
    rng = np.random.default_rng(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(6, 2, strides=2, data_format="channels_last")(inputs)
    x = keras.layers.Reshape((16, 6))(x)
    x = layers.MoE(4, 8, capacity_factor=0.5, name=LONG)(x)
    x = layers.SoftMoE(4, 8, slots_per_expert=2, name="soft")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.MMoE(3, [6], ["click", "like"], name="tasks")(x))
    images = rng.normal(size=(64, 8, 8, 1)).astype("float32")
    keras_moe.report(model, (images, np.arange(64) % 10), folder / "images.html")
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, layers.MoE(8, 8, name="moe")(keras.layers.Embedding(40, 6)(ids)))
    words = ["<b>", "word", LONG, *map(str, range(37))]
    texts = rng.integers(0, 40, (8, 60))
    keras_moe.report(model, texts, folder / "texts.html", vocabulary=words, title=LONG)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["images", "texts"])
def test_page(browser, reports, name, width, scheme):
    said = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url[:80]))
    page.goto((reports / f"{name}.html").as_uri(), wait_until="load")
    try:
        assert not said
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(STICKING_OUT) == []
        assert min(page.evaluate(CONTRASTS)) >= 4.5  # WCAG 2, level AA
        assert max(page.eval_on_selector_all("th[scope=row]", WIDTHS)) < width / 2
        pictures = page.eval_on_selector_all("img", PICTURES)
        assert len(pictures) == page.locator("figcaption").count() > 2
        for alternative, natural, drawn in pictures:
            assert len(alternative) > 10 and natural > 100 and drawn > 200
    finally:
        page.close()


def test_dark_pages_are_dark(browser, reports):
    paper = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((reports / "texts.html").as_uri())
        paper[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 23, 26)"}
