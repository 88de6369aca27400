"""The page in a headless Chromium, from the disk, with real clicks and keys. Skipped where there is no Chromium."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wsss.benchmarks.studies.speed.chromium import Chromium, find_chromium
from wsss.benchmarks.studies.speed.report_page import write_store
from wsss.classes import palette
from wsss.runtime.report.page import write_report
from wsss.store.decisions import Exclusion, read_rejected
from wsss.store.local import read_records

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium, which is not installed")
HOSTILE = "<img src=x onerror=window.ran=1><script>window.ran=1</script>.png"
CLASSES = ("red", "green", "<script>window.ran=2</script>", "blue", "pink", "brown", "never")
IMAGES = 130
"""Three pages of 60, 60 and 10; image i has i % 4 rectangles of classes i, i + 1, ... (see `write_store`)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 130 photographs, the first of a hostile name, and of two failures, with its page."""
    folder = tmp_path_factory.mktemp("page")
    names = [f"photo-{number:03}.jpg" for number in range(IMAGES)]
    names[1] = HOSTILE
    write_store(folder, names, classes=CLASSES, failures=["<b>bad.jpg", "worse.jpg"])
    write_report(folder / "store", folder / "images", folder / "store" / "report.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Chromium, folder: Path) -> Iterator[Chromium]:
    """The page freshly opened in a window of 1280 x 900; no test may leave a complaint behind."""
    browser.show(1280, 900)
    browser.open((folder / "store" / "report.html").as_uri())
    yield browser
    assert browser.complaints() == []


def text(page: Chromium, selector: str) -> Any:
    return page.evaluate(f"document.querySelector({selector!r}).innerText")


def content(page: Chromium, selector: str) -> Any:
    """Also of what is not drawn yet: a card gets its layout when it comes near the window."""
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def cards(page: Chromium) -> list[str]:
    titles: list[str] = page.evaluate("[...document.querySelectorAll('.card .file')].map((node) => node.title)")
    return titles


def focused(page: Chromium) -> Any:
    return page.evaluate("document.activeElement.closest('.card')?.querySelector('.file').title ?? document.activeElement.id")


def shown(page: Chromium, selector: str) -> bool:
    return bool(page.evaluate(f"document.querySelector({selector!r}).checkVisibility()"))


def opacity(page: Chromium, selector: str) -> float:
    return float(page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).opacity"))


def choose(page: Chromium, selector: str, value: str) -> None:
    """Chooses in a list as a user does with the keyboard: a headless browser has no pop-up to click in."""
    page.evaluate(f"document.querySelector({selector!r}).focus()")
    count = page.evaluate(f"document.querySelector({selector!r}).options.length")
    for _ in range(count):
        if page.evaluate(f"document.querySelector({selector!r}).value") == value:
            return
        page.press("ArrowDown")
    raise AssertionError(f"{selector} has no {value}")


def test_the_summary_and_the_failures_are_there(page: Chromium) -> None:
    assert "Images\n130" in text(page, "#tiles")
    assert "Failed\n2" in text(page, "#tiles")
    assert "Time\n1.00 s" in text(page, "#tiles")
    assert text(page, "#stages").split("\n")[:2] == ["tag 100 ms", "detect 600 ms"]
    assert text(page, "#failures h2") == "2 images failed"
    page.click("#failures summary")
    assert text(page, "#failures li").startswith("<b>bad.jpg not a readable image")
    assert page.evaluate("document.querySelectorAll('#histogram .class').length") == 7


def test_names_with_markup_are_text_and_nothing_of_them_runs(page: Chromium) -> None:
    page.click("#search")
    page.type("onerror")
    assert cards(page) == [HOSTILE]
    assert content(page, ".card .file") == HOSTILE
    page.press("Enter")
    page.press("Enter")
    assert text(page, "#viewer-name") == HOSTILE
    assert "<script>window.ran=2</script>" in text(page, "#histogram")
    assert page.evaluate("window.ran === undefined")
    assert page.evaluate("document.querySelectorAll('#gallery script, #gallery b, #histogram script').length") == 0


def test_even_markup_that_got_into_the_page_could_not_run(browser: Chromium, folder: Path) -> None:
    browser.open((folder / "store" / "report.html").as_uri())
    browser.evaluate("find('grid').innerHTML = '<img src=x onerror=\"window.ran = 1\">'")
    browser.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert browser.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in each for each in browser.complaints())


def test_nothing_is_asked_of_a_network(page: Chromium) -> None:
    page.click(".card")
    assert page.requests()
    assert {address.partition(":")[0] for address in page.requests()} == {"file"}


def test_pages_turn(page: Chromium) -> None:
    assert (len(cards(page)), text(page, "#page"), text(page, "#count")) == (60, "1 / 3", "1–60 of 130 images")
    first = cards(page)
    page.click("#next")
    assert text(page, "#page") == "2 / 3"
    assert not set(first) & set(cards(page))
    page.press("n")
    assert (len(cards(page)), text(page, "#count")) == (10, "121–130 of 130 images")
    page.click("#next")
    assert text(page, "#page") == "3 / 3"
    page.press("p")
    page.click("#previous")
    assert cards(page) == first


def test_the_most_doubtful_come_first_and_other_orders_are_there(page: Chromium) -> None:
    doubts = page.evaluate("[...document.querySelectorAll('.card .doubt')].map((node) => Number(node.lastChild.data))")
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[0] > doubts[-1]
    choose(page, "#order", "name")
    assert cards(page)[:2] == [HOSTILE, "photo-000.jpg"]


def test_a_class_filters_from_the_list_and_from_the_histogram(page: Chromium, folder: Path) -> None:
    blue = {each["path"] for each in read_records(folder / "store") if "blue" in each.get("classes", ())}
    assert 20 < len(blue) < 60
    choose(page, "#class", "3")
    assert text(page, "#count") == f"1–{len(blue)} of {len(blue)} images"
    assert set(cards(page)) == blue
    assert page.evaluate("document.querySelector('.class[aria-pressed=true] .name').textContent") == "blue"
    page.click(".class[aria-pressed=false]")
    assert page.evaluate("find('class').value") != "3"
    assert set(cards(page)) != blue
    page.click(".class[aria-pressed=true]")
    assert text(page, "#count") == "1–60 of 130 images"


def test_a_reason_filters(page: Chromium) -> None:
    choose(page, "#cause", "disagreement")
    assert cards(page)
    reasons = page.evaluate("[...document.querySelectorAll('.card .reason')].map((node) => node.textContent)")
    assert all(reason.startswith("tagged, no box: ") for reason in reasons)
    choose(page, "#cause", "empty")
    assert cards(page)
    assert set(cards(page)) <= {f"photo-{number:03}.jpg" for number in range(0, IMAGES, 4)}


def test_a_class_that_no_image_has_leaves_a_way_back(page: Chromium) -> None:
    choose(page, "#class", "6")
    assert (cards(page), text(page, "#count")) == ([], "no image")
    page.click("#reset")
    assert len(cards(page)) == 60


def test_the_histogram_counts_what_is_chosen(page: Chromium, folder: Path) -> None:
    boxes = Counter(box["label"] for each in read_records(folder / "store") for box in each.get("boxes", ()))
    page.click("#measure input[value=boxes] + span")
    [(name, most)] = boxes.most_common(1)
    assert text(page, "#histogram li:first-child .number") == str(most)
    assert boxes[text(page, "#histogram li:first-child .name")] == most, name
    assert text(page, "#histogram li:last-child .number") == "0"
    page.click("#measure input[value=pixels] + span")
    assert text(page, "#histogram li:first-child .number").endswith(" %")


def test_search_by_keys(page: Chromium) -> None:
    page.press("/")
    assert focused(page) == "search"
    page.type("00 PHOTO")
    assert cards(page) and all("00" in name for name in cards(page))
    page.press("Escape")
    assert page.evaluate("find('search').value") == ""
    assert (len(cards(page)), focused(page)) == (60, "search")
    page.press("Escape")
    assert focused(page) == cards(page)[0]


def test_the_slider_fades_the_label_by_mouse_and_keys(page: Chromium) -> None:
    assert opacity(page, ".card .label") == pytest.approx(0.6)
    page.click("#opacity", across=0.02)
    assert opacity(page, ".card .label") == 0
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert opacity(page, ".card .label") == pytest.approx(0.1)
    assert text(page, "#gallery output") == "10 %"
    page.click("#opacity", across=0.98)
    assert opacity(page, ".card .label") == 1
    page.evaluate("document.activeElement.blur()")
    page.press("[")
    assert opacity(page, ".card .label") == pytest.approx(0.9)
    page.press("l")
    assert opacity(page, ".card .label") == 0
    page.press("l")
    page.press("]")
    assert opacity(page, ".card .label") == 1
    assert opacity(page, ".card .photo") == 1


def test_arrows_move_over_the_cards_and_across_pages(page: Chromium) -> None:
    names = cards(page)
    columns = page.evaluate("columns()")
    assert 3 < columns < 8
    page.press("ArrowDown")
    assert focused(page) == "", "outside of the gallery it scrolls"
    page.click("#next")
    page.click("#previous")
    page.press("ArrowRight")
    assert focused(page) == names[0]
    for key, at in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", 59),
        ("Home", 0),
    ):
        page.press(key)
        assert focused(page) == names[at], key
    page.press("End")
    page.press("ArrowRight")
    assert text(page, "#page") == "2 / 3"
    assert focused(page) == cards(page)[0]
    page.press("ArrowLeft")
    assert focused(page) == names[59]


def test_tab_reaches_one_card_alone(page: Chromium) -> None:
    assert page.evaluate("document.querySelectorAll('.card[tabindex=\"0\"]').length") == 1


def test_the_large_view_opens_walks_and_closes(page: Chromium) -> None:
    names = cards(page)
    page.press("ArrowRight")
    page.press("Enter")
    assert shown(page, "#viewer")
    assert (text(page, "#viewer-name"), text(page, "#viewer-position")) == (names[0], "1 of 130")
    page.until("find('viewer-photo').src.includes('/images/')")  # the original took the thumbnail's place
    assert page.evaluate("decodeURIComponent(find('viewer-photo').src)").endswith(f"images/{names[0]}")
    page.until("find('viewer-label').classList.contains('original')")
    for _ in range(61):
        page.press("ArrowRight")
    page.press("ArrowLeft")
    assert text(page, "#viewer-position") == "61 of 130"
    page.press("[")
    assert opacity(page, "#viewer-label") == pytest.approx(0.5)
    page.press("b")
    assert page.evaluate("document.querySelectorAll('.box').length") > 0
    page.press("Escape")
    assert not shown(page, "#viewer")
    page.until("find('page').innerText === '2 / 3'")
    assert focused(page) == cards(page)[0], "the focus is on the image that was looked at last"
    page.click(".card")
    page.click("#viewer-next")
    assert text(page, "#viewer-position") == "62 of 130"
    page.click("#viewer-close")
    assert not shown(page, "#viewer")


def test_arrows_on_the_slider_of_the_large_view_belong_to_the_slider(page: Chromium) -> None:
    page.click(".card")
    page.evaluate("find('viewer-opacity').focus()")
    page.press("ArrowRight")
    assert text(page, "#viewer-position") == "1 of 130"
    assert opacity(page, "#viewer-label") == pytest.approx(0.65)


def test_the_original_label_is_clear_where_there_is_background(page: Chromium, folder: Path, tmp_path: Path) -> None:
    page.press("/")
    page.type("onerror")
    page.click(".card")
    page.until("find('viewer-photo').classList.contains('original') && find('viewer-label').classList.contains('original')")
    for _ in range(5):
        page.press("]")
    page.next_frame()
    page.next_frame()
    page.screenshot(tmp_path / "view.png")
    left, top, width = page.evaluate("(({ x, y, width }) => [x, y, width])(find('stage').getBoundingClientRect())")
    [box] = next(each for each in read_records(folder / "store") if each["path"] == HOSTILE)["boxes"]
    (x0, y0, x1, y1), size = box["xyxy"], 64 / width
    with Image.open(tmp_path / "view.png") as picture, Image.open(folder / "images" / HOSTILE) as photo:
        shown, there = picture.convert("RGB"), photo.convert("RGB")
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    assert shown.getpixel((int(left + middle[0] / size), int(top + middle[1] / size))) == tuple(palette()[2].tolist())
    beside = (x1 + 2, y1 + 2) if x1 < 60 and y1 < 44 else (x0 - 2, y0 - 2)
    assert shown.getpixel((int(left + beside[0] / size), int(top + beside[1] / size))) == there.getpixel(beside)


def test_keys_are_explained(page: Chromium) -> None:
    page.press("?")
    assert shown(page, "#keys")
    page.press("n")
    page.press("Escape")
    assert not shown(page, "#keys")
    assert text(page, "#page") == "1 / 3"
    page.click("#show-keys")
    assert shown(page, "#keys")


def test_a_picture_that_went_missing_is_said(browser: Chromium, tmp_path: Path) -> None:
    write_store(tmp_path, ["here.png", "gone.png"], classes=CLASSES)
    (tmp_path / "images" / "gone.png").unlink()
    browser.open(write_report(tmp_path / "store", tmp_path / "images", tmp_path / "page.html").as_uri())
    assert "Pictures missing\n1" in text(browser, "#tiles")
    choose(browser, "#cause", "note")
    assert cards(browser) == ["gone.png"]
    assert "cannot be read" in content(browser, ".card .alarm")
    assert browser.evaluate("document.querySelectorAll('.card .photo').length") == 0
    assert browser.evaluate("document.querySelectorAll('.card .label').length") == 1


def test_a_page_without_its_folder_says_so(browser: Chromium, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.html").write_bytes((folder / "store" / "report.html").read_bytes())
    browser.open((tmp_path / "alone.html").as_uri())
    assert "keep the page and its folder .files together" in text(browser, "#problem")
    assert not shown(browser, "main")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_down_only_and_its_controls_fit_a_finger(page: Chromium, dark: bool) -> None:
    page.show(375, 812, dark=dark, phone=True)
    fits = "document.documentElement.scrollWidth <= 375"
    assert page.evaluate(fits)
    for panel in ("#classes", "#failures", "#settings"):
        page.evaluate(f"document.querySelector('{panel}').open = true")
    assert page.evaluate(fits)
    assert page.evaluate("columns()") == 2
    for control in ("#previous", "#next", "#search", "#class", "#opacity"):
        assert page.evaluate(f"document.querySelector('{control}').getBoundingClientRect().height") >= 40, control
    page.click(".card")
    assert page.evaluate(fits)
    for control in ("#viewer-close", "#viewer-next", "#viewer-opacity", "#viewer-facts", "#show-boxes"):
        box = page.evaluate(
            f"(({{ left, right, bottom }}) => [left, right, bottom])(document.querySelector('{control}').getBoundingClientRect())"
        )
        assert box[0] >= 0 and box[1] <= 375 and box[2] <= 812, control


CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, row) => sum + v * [0.2126, 0.7152, 0.0722][row], 0);
  const ground = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!text || !node.checkVisibility() || node.closest(":disabled, script, style, .unseen, .skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(`${node.tagName} ${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
  }
  return weak;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_contrast(page: Chromium, dark: bool) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1."""
    page.show(1280, 900, dark=dark)
    for panel in ("#classes", "#failures", "#settings"):
        page.evaluate(f"document.querySelector('{panel}').open = true")
    assert page.evaluate(CONTRAST) == []
    page.click(".card")
    assert page.evaluate(CONTRAST) == []


NAMELESS = """[...document.querySelectorAll("button, input, select, a, [role=region], dialog, section, nav")].filter((node) =>
  !(node.ariaLabel || node.labels?.length || node.innerText?.trim() || node.getAttribute("aria-labelledby")
    || node.textContent.trim())).map((node) => node.outerHTML.slice(0, 80))"""

OUTLINE = """(() => {
  const node = document.activeElement;
  const seen = node.matches("#measure input") ? node.nextElementSibling : node;
  return [node.id || node.className || node.tagName, getComputedStyle(seen).outlineStyle];
})()"""


def test_controls_have_names_and_the_focus_is_seen(page: Chromium) -> None:
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    for _ in range(12):
        page.press("Tab")
        assert page.evaluate(OUTLINE)[1] not in ("none", ""), page.evaluate(OUTLINE)


# ---- decisions ----


def decisions(page: Chromium) -> dict[str, str]:
    found: dict[str, str] = page.evaluate("Object.fromEntries(decisions.of)")
    return found


@pytest.fixture
def undecided(page: Chromium, folder: Path) -> Iterator[Chromium]:
    """The page of a browser that has decided nothing yet."""
    page.evaluate("localStorage.clear()")
    page.open((folder / "store" / "report.html").as_uri())
    yield page
    page.evaluate("localStorage.clear()")


def test_keys_decide_and_take_back(undecided: Chromium, folder: Path) -> None:
    page = undecided
    assert not shown(page, "#decisions")
    page.evaluate("focusCard(0)")
    first, second, third = cards(page)[:3]
    for key in ("r", "ArrowRight", "a", "ArrowRight", "u", "u", "u"):
        page.press(key)
    assert decisions(page) == {first: "reject", second: "accept", third: "unsure"}
    assert focused(page) == third
    assert text(page, "#decisions span") == "1 accepted, 1 rejected, 1 unsure."
    assert text(page, ".card.reject .decision") == "Rejected"
    page.press("u")
    assert decisions(page) == {first: "reject", second: "accept"}
    page.open((folder / "store" / "report.html").as_uri())
    assert decisions(page) == {first: "reject", second: "accept"}, "they stay in the browser"
    choose(page, "#decision", "none")
    assert text(page, "#count").endswith("of 128 images")
    choose(page, "#decision", "reject")
    assert cards(page) == [first]


def test_a_search_takes_letters_and_decides_nothing(undecided: Chromium) -> None:
    undecided.click("#search")
    undecided.type("aru")
    assert decisions(undecided) == {}


def test_three_are_rejected_saved_and_left_out(undecided: Chromium, folder: Path, tmp_path: Path) -> None:
    page = undecided
    page.click(".card")
    rejected = []
    for _ in range(3):
        rejected.append(text(page, "#viewer-name"))
        page.click("#viewer-decide [value=reject]")
        page.click("#viewer-next")
    page.click("#viewer-decide [value=accept]")
    assert page.evaluate("document.querySelector('#viewer-decide [value=accept]').getAttribute('aria-pressed')") == "true"
    page.press("Escape")
    page.evaluate("URL.createObjectURL = (blob) => { blob.text().then((text) => (window.saved = text)); return '#'; }")
    page.click("#save-decisions")
    page.until("window.saved !== undefined")
    (path := tmp_path / "decisions.json").write_text(page.evaluate("window.saved"), encoding="utf-8")
    assert list(read_rejected(path, flag="--exclude")) == rejected
    exclude = Exclusion(path)
    kept = [record["path"] for record in exclude.filter(read_records(folder / "store"))]
    assert len(kept) == IMAGES + 2 - 3 and not set(kept) & set(rejected) and not exclude.outdated


def test_a_decision_about_an_earlier_label_is_forgotten(undecided: Chromium, folder: Path) -> None:
    page = undecided
    page.evaluate("focusCard(0)")
    page.press("r")
    page.press("ArrowRight")
    page.press("r")
    page.evaluate(
        "{ const kept = JSON.parse(localStorage.getItem(decisions.place)); Object.values(kept)[0].label = 'old';"
        " kept['elsewhere.jpg'] = { decision: 'reject', label: 'x' };"
        " localStorage.setItem(decisions.place, JSON.stringify(kept)); }"
    )
    second = cards(page)[1]
    page.open((folder / "store" / "report.html").as_uri())
    assert decisions(page) == {second: "reject"}
    assert list(page.evaluate("decidedImages()")) == ["elsewhere.jpg", second], "images that the page does not show stay decided"
