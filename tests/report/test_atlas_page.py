"""The atlas in a real browser, used as a reader uses it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chromium import CHROMIUM, Chromium, open_chromium
from PIL import Image
from scipy.ndimage import maximum_filter

from weightspace.report.atlas import Atlas, build_atlas, write_atlas

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

MODELS = 90
HOSTILE = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>"
PALEST = 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with open_chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    rng = np.random.default_rng(0)
    group = np.arange(MODELS) % 3
    frame = pd.DataFrame(
        {
            "model_id": [f"run-{i:03d}" for i in range(MODELS - 1)] + [HOSTILE],
            "dataset": [None if i == 1 else f"digits-{one}" for i, one in enumerate(group)],
            "test_accuracy": [np.nan if i == 2 else (i + 0.5) / MODELS for i in range(MODELS)],
            "learning_rate": 10.0 ** -(1 + np.arange(MODELS) % 5),
            "note": [HOSTILE] * MODELS,
            "location": [f"org/name@{'0' * 40}:model-{i}" for i in range(MODELS)],
            "embedding": list(rng.normal(size=(MODELS, 8)) + 3 * group[:, None]),
        }
    )
    return build_atlas(frame, f"A zoo {HOSTILE}")


@pytest.fixture(scope="module")
def address(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_atlas(atlas, tmp_path_factory.mktemp("atlas") / "atlas.html").as_uri()


@pytest.fixture
def page(browser: Chromium, address: str) -> Iterator[Chromium]:
    """The page as it opens; whatever a test does with it, nothing is asked for and nothing goes wrong."""
    browser.open(address)
    yield browser
    assert browser.complaints == []
    assert browser.requests == [address]
    assert browser.run("window.hacked") is None


def text(page: Chromium, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


def texts(page: Chromium, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText.trim())")


def facts(page: Chromium, selector: str) -> dict[str, str]:
    return dict(zip(texts(page, f"{selector} dt"), texts(page, f"{selector} dd"), strict=True))


def contrast(page: Chromium) -> np.ndarray:
    """How far each pixel of the canvas is from the page, from 0 to 255; from a copy, as reading slows a canvas down."""
    url = page.run(
        "(() => { const {width, height} = document.getElementById('map');"
        "const copy = Object.assign(document.createElement('canvas'), {width, height});"
        "copy.getContext('2d', {willReadFrequently: true}).drawImage(document.getElementById('map'), 0, 0);"
        "return copy.toDataURL(); })()"
    )
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)
    return np.abs(pixels - pixels[0, 0]).max(axis=2)


def boldness(page: Chromium, models: int = MODELS) -> np.ndarray:
    """How far from the page the canvas is where each model stands; a ring's middle is empty."""
    x, y = places(page, models).round().astype(int).T
    return maximum_filter(contrast(page), 7)[y, x]


def places(page: Chromium, models: int = MODELS) -> np.ndarray:
    return np.array(page.run(f"Array.from({{length: {models}}}, (_, i) => atlas.place(i))"))


def lone(page: Chromium) -> int:
    """The model that stands farthest from all others on the screen."""
    apart = np.linalg.norm(places(page)[:, None] - places(page), axis=2)
    np.fill_diagonal(apart, np.inf)
    return int(apart.min(axis=1).argmax())


def hover(page: Chromium, x: float, y: float) -> None:
    page.mouse("mouseMoved", x, y)
    page.settle()
    page.settle()


def choose_colour(page: Chromium, name: str) -> None:
    page.run(
        "(() => { const menu = document.getElementById('colour');"
        f"menu.value = [...menu.options].find((one) => one.text === {json.dumps(name)}).value;"
        "menu.dispatchEvent(new Event('change')); })()"
    )
    page.settle()


def test_every_model_is_drawn(page: Chromium) -> None:
    assert page.run("document.getElementById('map').dataset.drawn") == str(MODELS)
    assert boldness(page).min() > PALEST
    assert 0.9 < (contrast(page) == 0).mean() < 1
    assert text(page, "h1") == f"A zoo {HOSTILE}"
    assert f"{MODELS} models" in text(page, ".head")


def test_a_card_tells_what_the_model_under_the_pointer_is(page: Chromium, atlas: Atlas) -> None:
    model = lone(page)
    assert page.run("document.getElementById('card').hidden")
    hover(page, *places(page)[model])
    assert not page.run("document.getElementById('card').hidden")
    assert text(page, "#card h3") == atlas.names[model]
    told = facts(page, "#card")
    assert told["dataset"] == atlas.columns["dataset"][model]
    assert float(told["test accuracy"]) == pytest.approx(atlas.columns["test_accuracy"][model], rel=1e-3)
    assert "note" not in told  # which all models have alike
    hover(page, 3, 300)
    assert page.run("document.getElementById('card').hidden")


def test_colours_and_their_legend_follow_the_column(page: Chromium) -> None:
    assert text(page, "#colour").split("\n") == ["dataset", "test accuracy", "learning rate", "nothing"]
    rows = [row.split("\n") for row in texts(page, "#levels li")]
    assert rows == [["digits-0", "30"], ["digits-1", "29"], ["digits-2", "30"], ["not known", "1"]]
    choose_colour(page, "test accuracy")
    assert texts(page, "#levels li") == []
    assert texts(page, ".ends span") == ["0.005556", "0.9944"]
    assert "1 model without it" in text(page, "#legend")
    assert "Logarithmic" not in text(page, "#legend")
    choose_colour(page, "learning rate")
    assert texts(page, ".ends span") == ["0.00001", "0.1"]
    assert "Logarithmic" in text(page, "#legend")
    choose_colour(page, "nothing")
    assert text(page, "#legend") == ""
    assert boldness(page).min() > PALEST


def test_a_value_of_the_legend_can_be_seen_alone(page: Chromium, atlas: Atlas) -> None:
    page.run("document.querySelector('#levels button').click()")
    page.settle()
    alone = np.array([value == "digits-0" for value in atlas.columns["dataset"]])
    assert text(page, "#count") == f"30 of {MODELS} models"
    assert boldness(page)[alone].min() > np.median(boldness(page)[~alone]) + 60
    page.run("document.querySelector('#levels button').click()")
    page.settle()
    assert text(page, "#count") == ""
    assert boldness(page).min() > PALEST


def test_search_finds_parts_of_names_and_texts_and_dims_the_rest(page: Chromium, atlas: Atlas) -> None:
    page.run("document.getElementById('search').focus()")
    page.write("GITS-2")
    assert text(page, "#count") == f"30 of {MODELS} models"
    hits = np.array([value == "digits-2" for value in atlas.columns["dataset"]])
    assert boldness(page)[hits].min() > np.median(boldness(page)[~hits]) + 60
    page.run("document.getElementById('search').select()")
    page.write("run-007")
    assert text(page, "#count") == f"1 of {MODELS} models"
    assert texts(page, "#found li") == ["run-007"]
    page.press("Enter")
    assert text(page, "#chosen h3") == "run-007"
    page.run("document.getElementById('search').select()")
    page.write("nowhere")
    assert text(page, "#count") == f"0 of {MODELS} models"
    assert page.run("document.getElementById('found').hidden")


def test_a_click_lists_the_nearest_neighbours(page: Chromium, atlas: Atlas, address: str) -> None:
    model = lone(page)
    page.click(*places(page)[model])
    assert text(page, "#chosen h3") == atlas.names[model]
    assert facts(page, "#chosen")["note"] == HOSTILE
    assert page.run("document.querySelector('#chosen a').href") == f"https://huggingface.co/org/name/tree/{'0' * 40}"
    assert page.run("document.querySelector('#chosen a').rel") == "noopener noreferrer"
    expected = [
        [atlas.names[row], f"{distance:.3f}"]
        for row, distance in zip(atlas.neighbours[model], atlas.distances[model], strict=True)
    ]
    assert [row.split("\n") for row in texts(page, "#neighbours li")] == expected
    assert page.run("location.hash") == f"#{atlas.names[model]}"
    page.run("document.querySelector('#neighbours button').click()")
    page.settle()
    assert text(page, "#chosen h3") == expected[0][0]
    page.press("Escape")
    assert page.run("document.getElementById('chosen').hidden")
    assert page.run("location.href") == address


def test_a_link_with_a_name_opens_that_model(browser: Chromium, address: str) -> None:
    browser.open(f"{address}#run-042")
    assert text(browser, "#chosen h3") == "run-042"
    browser.open(f"{address}#%E0%A4%A")
    assert browser.run("document.getElementById('chosen').hidden")
    assert browser.complaints == []


def test_the_map_zooms_and_moves_by_wheel_buttons_keys_and_hand(page: Chromium) -> None:
    start = places(page)
    page.mouse("mouseWheel", 200, 300, deltaX=0, deltaY=-200)
    page.settle()
    wheeled = places(page)
    assert np.allclose((wheeled - [200, 300]) / (start - [200, 300]), np.exp(0.44), rtol=1e-3)
    page.run("document.getElementById('out').click()")
    page.run("document.getElementById('in').click()")
    assert np.allclose(places(page), wheeled)
    page.run("document.getElementById('map').focus()")
    page.press("ArrowLeft")
    assert np.allclose(places(page), np.add(wheeled, [60, 0]))
    page.press("0")
    x, y = start[lone(page)]
    for kind, moved in (("mousePressed", 0), ("mouseMoved", 20), ("mouseMoved", 90), ("mouseReleased", 90)):
        page.mouse(kind, x + moved, y, button="left", buttons=1, clickCount=1)
    page.settle()
    assert np.allclose(places(page), np.add(start, [90, 0]))
    assert page.run("document.getElementById('chosen').hidden")  # a pull is no click
    for _ in range(3):
        page.press("+")
    assert int(page.run("document.getElementById('map').dataset.drawn")) < MODELS
    page.press("0")
    assert np.allclose(places(page), start)


def test_two_fingers_zoom_and_one_tap_chooses(page: Chromium, atlas: Atlas) -> None:
    start, model = places(page), lone(page)
    for kind, reach in (("touchStart", 40), ("touchMove", 60), ("touchMove", 120), ("touchEnd", 0)):
        fingers = [{"x": 400 - reach, "y": 300, "id": 1}, {"x": 400 + reach, "y": 300, "id": 2}] if reach else []
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)
    page.settle()
    assert np.ptp(places(page)[:, 0]) > 1.5 * np.ptp(start[:, 0])
    page.run("document.getElementById('all').click()")
    page.settle()
    x, y = places(page)[model]
    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.settle()
    assert text(page, "#chosen h3") == atlas.names[model]


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (800, 600), (390, 800)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_window_in_light_and_dark(
    browser: Chromium, address: str, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    browser.open(address, width, height, dark=dark)
    browser.click(*places(browser)[lone(browser)])
    boxes = browser.run(
        "['.map', '.panel', '.zoom', '.head'].map((one) => {"
        "const {left, top, right, bottom} = document.querySelector(one).getBoundingClientRect();"
        "return [left, top, right, bottom]; })"
    )
    (map_left, map_top, map_right, map_bottom), panel, buttons, head = boxes
    assert panel[0] >= map_right or panel[1] >= map_bottom
    assert head[3] < buttons[1]
    assert buttons[2] <= map_right
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('.panel').scrollWidth <= document.querySelector('.panel').clientWidth")
    on_screen = places(browser)
    assert (on_screen > [map_left, map_top]).all()
    assert (on_screen < [map_right, map_bottom]).all()
    picture = tmp_path / "page.png"
    browser.picture(picture)
    background = np.median(np.asarray(Image.open(picture).convert("L")))
    assert background < 60 if dark else background > 200


def test_a_dense_screen_gets_all_its_pixels(browser: Chromium, address: str) -> None:
    browser.open(address, ratio=2)
    canvas = browser.run(
        "(() => { const {width, clientWidth} = document.getElementById('map'); return [width, clientWidth]; })()"
    )
    assert canvas[0] == pytest.approx(2 * canvas[1], abs=1)


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_small_zoos_can_be_used_too(browser: Chromium, tmp_path: Path, models: int, equal: bool) -> None:
    embeddings = np.ones((models, 4)) if equal else np.random.default_rng(0).normal(size=(models, 4))
    frame = pd.DataFrame({"model_id": [f"m{i}" for i in range(models)], "embedding": list(embeddings)})
    frame["test_accuracy"] = np.nan
    browser.open(write_atlas(build_atlas(frame, "small"), tmp_path / "atlas.html").as_uri())
    assert browser.run("document.getElementById('map').dataset.drawn") == str(models)
    assert texts(browser, "#colour option") == ["nothing"]
    browser.click(*browser.run("atlas.place(0)"))
    assert text(browser, "#chosen h3").startswith("m")
    assert len(texts(browser, "#neighbours li")) == models - 1
    assert browser.complaints == []


@pytest.mark.slow
def test_20_000_models_are_drawn_and_found(browser: Chromium, tmp_path: Path) -> None:
    models = 20_000
    rng = np.random.default_rng(0)
    atlas = Atlas(
        title="many",
        names=[f"model-{i:05d}" for i in range(models)],
        pages=[None] * models,
        columns={"dataset": [f"d{i % 50}" for i in range(models)], "test_accuracy": rng.uniform(size=models).tolist()},
        left_out_columns=0,
        places=rng.uniform(-1, 1, size=(models, 2)),
        method="at random",
        neighbours=rng.integers(models, size=(models, 10)),
        distances=np.sort(rng.uniform(0, 2, size=(models, 10)), axis=1),
        left_out=0,
    )
    browser.open(write_atlas(atlas, tmp_path / "atlas.html").as_uri())
    assert browser.run("document.getElementById('map').dataset.drawn") == str(models)
    assert boldness(browser, models).min() > PALEST
    rows = texts(browser, "#levels li")
    assert len(rows) == 32
    assert rows[-1].split("\n") == ["19 rarer values", "7,600"]
    browser.run("document.getElementById('search').focus()")
    browser.write("model-12345")
    assert text(browser, "#count") == "1 of 20,000 models"
    browser.press("Enter")
    wanted: list[Any] = [f"model-{i:05d}" for i in atlas.neighbours[12345]]
    assert [row.split("\n")[0] for row in texts(browser, "#neighbours li")] == wanted
    browser.run("document.getElementById('search').select()")
    browser.press("Backspace")
    hover(browser, *browser.run("atlas.place(12345)"))
    shown = int(text(browser, "#card h3").removeprefix("model-"))
    x, y = browser.run("atlas.place(12345)")
    assert np.hypot(*np.subtract(browser.run(f"atlas.place({shown})"), (x, y))) < 1
    assert browser.complaints == []
