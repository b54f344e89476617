"""The page of `examples/space`: its logic with tiny models, and the page itself where a browser and gradio are.

python tests/examples/test_space.py examples/space/screenshot.png    # takes the README's picture again, with the demo pair
"""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.oracle import oracle
from helpers.tiny_models import make_drafter, make_target, make_tokenizer


SPACE = Path(__file__).parents[2] / "examples" / "space"
sys.path.insert(0, str(SPACE))

import race  # noqa: E402


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1180,1080"
)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(race, "TURN_SECONDS", 0.005)
    monkeypatch.setattr(race, "REFRESH_SECONDS", 0.005)
    target = make_target(dtype=torch.float32)
    return race.Pair(target, make_tokenizer(), make_drafter(target), "tiny target", "tiny drafter")


def expected(pair, prompt: str, tokens: int) -> torch.Tensor:
    return pair.target.generate(**race.encode(pair.tokenizer, prompt), max_new_tokens=tokens, do_sample=False)


def test_lanes_are_plain_generate_and_show_what_was_drafted(pair):
    plain = expected(pair, "hello", 32)
    with oracle(plain):
        turns = [(len(lanes[0].tokens), len(lanes[1].tokens)) for lanes in race.race(pair, "hello", 32)]
        lanes = list(race.race(pair, "hello", 32))[-1]
    new = plain[0, -32:].tolist()
    stats = pair.drafter.last_stats
    assert lanes[0].tokens == lanes[1].tokens == new
    assert not any(lanes[0].drafted)
    assert sum(lanes[1].drafted) == stats.n_accepted > 0
    assert lanes[1].drafted.count(False) == stats.steps + 1  # the prompt's forward chose one, too
    assert lanes[1].acceptance_length == stats.acceptance_length
    assert turns == sorted(turns)
    assert all(lane.seconds > 0 for lane in lanes)


def test_turns_alternate_and_clocks_stand_still_meanwhile():
    turns = race.Turns(2)
    first = race.Lane(turns, 0)
    first.put(torch.tensor([[1, 2]]))  # the prompt does not count as a token
    assert first.tokens == []
    turns.pass_on = lambda lane: time.sleep(0.3)  # another's turn
    first._turn_began = -1e9
    for token in (5, 6):
        first.put(torch.tensor([token]))
    assert first.tokens == [5, 6] and first.seconds < 0.25
    assert race.Turns(2).running == [0, 1]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(pair, prompt):
    with pytest.raises(ValueError, match="The prompt is empty"):
        list(race.race(pair, prompt, 8))


def test_an_error_of_one_generation_reaches_the_page(pair):
    pair.drafter.config.draft_top_k = 0
    with pytest.raises(ValueError, match="draft_top_k=0"):
        list(race.race(pair, "hello", 8))


def test_a_visitor_who_leaves_stops_both_threads(pair):
    running = race.race(pair, "hello", 400)
    lanes = next(running)
    running.close()
    assert all(lane.done and lane.error is None for lane in lanes)
    assert max(len(lane.tokens) for lane in lanes) < 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TARGET": "a/model"}, "TARGET=a/model is given without DRAFTER"),
        ({"DRAFTER": "a/drafter"}, "DRAFTER=a/drafter is given without TARGET"),
        ({"DTYPE": "int8"}, "DTYPE=int8 is unknown"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        race.load_pair(settings)


def test_another_pair(pair, tmp_path):
    pair.target.save_pretrained(tmp_path / "target")
    pair.tokenizer.save_pretrained(tmp_path / "target")
    pair.drafter.save_pretrained(tmp_path / "drafter")
    names = {"TARGET": str(tmp_path / "target"), "DRAFTER": str(tmp_path / "drafter")}
    loaded = race.load_pair(names)
    assert loaded.target.dtype == loaded.drafter.dtype == torch.float32 or torch.accelerator.is_available()
    with pytest.raises(ValueError, match="name a CORAL drafter"):
        race.load_pair({**names, "DRAFTER": names["TARGET"]})


def test_characters_of_several_tokens_come_whole():
    texts = {1: "a", 2: "a\N{REPLACEMENT CHARACTER}", 3: "a\N{SNOWMAN}"}
    assert race.pieces(lambda ids: texts[len(ids)], [7, 8, 9]) == ["a", "", "\N{SNOWMAN}"]


def test_rendering_escapes_and_marks(pair):
    turns = race.Turns(2)
    plain, coral = race.Lane(turns, 0), race.Lane(turns, 1, pair.drafter)
    ids = pair.tokenizer("<b>&").input_ids
    for lane, forwards in ((plain, [0, 1, 2, 3]), (coral, [0, 1, 1, 2])):
        lane.tokens, lane.forwards, lane.seconds, lane.done = list(ids), forwards, 2.0, True
    html = race.render_lane("CORAL", coral, pair.tokenizer)
    assert '<span class="own">&lt;</span><span class="drafted">b</span><span class="own">&gt;</span>' in html
    assert "caret" not in html and ">2.0<" in html
    assert "the same 4 tokens; 25% of them" in race.render_verdict((plain, coral), float32=True)
    coral.tokens[2] += 1
    assert "differ from token 3 on, a near-tie" in race.render_verdict((plain, coral), float32=False)
    assert "&lt;script&gt;" in race.render_error(ValueError("<script>"))


def open_browser(profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in (*SWITCHES.split(), f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


def wait_for(browser, selector: str, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := browser.find_elements("css selector", selector)):
        assert time.monotonic() < deadline, f"no {selector} in {seconds} s: {browser.page_source[-2000:]}"
        time.sleep(0.1)
    return found[0]


def requested_hosts(browser) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url.split("/")[2].split(":")[0] for url in urls if url.startswith(("http:", "https:"))}


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver")
def test_page_in_a_browser(pair, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r examples/space/requirements.txt")
    pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(race, "REFRESH_SECONDS", 0.2)  # every refresh is work for the browser
    called, connect = set(), socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, address: (called.add(address[0]), connect(s, address))[1])
    import app

    def broken():
        raise ValueError("DRAFTER=<none> is not a drafter; name another.")

    pages = [app.build(lambda: pair), app.build(broken)]
    browser = open_browser(tmp_path / "profile")
    try:
        _, url, _ = app.launch(pages[0], prevent_thread_lock=True, quiet=True)
        browser.get(url)
        go = wait_for(browser, "#go")
        with oracle(expected(pair, app.EXAMPLES[0], 128)):
            time.sleep(1)  # until the page listens to its buttons
            go.click()
            verdict = wait_for(browser, ".verdict.done")
        assert "the same 128 tokens" in verdict.text
        left, right = (browser.find_element("css selector", f"#lane-{i}") for i in (0, 1))
        assert not left.find_elements("css selector", ".drafted")
        drafted, own = (right.find_elements("css selector", kind) for kind in (".drafted", ".text .own"))
        assert drafted and own
        colours = [spans[0].value_of_css_property("background-color") for spans in (drafted, own)]
        assert colours[0] != colours[1]

        def text(lane):
            return lane.find_element("css selector", ".text").get_attribute("textContent")

        assert text(left) == text(right) != ""
        prompt = browser.find_element("css selector", "#prompt textarea")
        prompt.send_keys("\ue009a\ue000\ue003")  # control and a, then backspace: clear() sends no input event
        go.click()
        assert "The prompt is empty" in wait_for(browser, ".verdict.error").text
        _, url, _ = app.launch(pages[1], prevent_thread_lock=True, quiet=True)
        browser.get(url)
        assert "DRAFTER=<none> is not a drafter" in wait_for(browser, "[role=alert]").text
        assert not wait_for(browser, "#go").is_enabled()
        assert requested_hosts(browser) <= {"127.0.0.1", "localhost"}
        assert called <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}
    finally:
        browser.quit()
        for page in pages:
            page.close()


def take_screenshot(path: str, profile: Path) -> None:
    import app

    page = app.build()
    _, url, _ = app.launch(page, prevent_thread_lock=True, quiet=True)
    browser = open_browser(profile)
    try:
        browser.get(url)
        go = wait_for(browser, "#go")
        time.sleep(2)
        go.click()
        wait_for(browser, ".verdict.done", 600)
        time.sleep(1)  # until the last tokens are drawn
        browser.save_screenshot(path)
    finally:
        browser.quit()
        page.close()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        take_screenshot(sys.argv[1], Path(folder))
