"""A walk through the person's page in a real browser, with the keyboard alone. Not run in CI.

    pip install selenium; apt-get install chromium chromium-driver
    python extras/editors/walk.py out/walk

It starts edit.py, opens Debian's chromium at 1280 and at 390 pixels, light and dark, and checks
what only a browser can show: keys, input methods, the live diff, the growing field, that the caret
and the notes are in view, that a thumb can hit the buttons, two tabs, a reload, and a kill of the
browser and of the server while text is in the field. Screenshots go to the folder; look at them.
"""
import json, os, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = """How to edit

1. Correct what is wrong: facts, sums, spelling.
2. Leave the style as it is, and whatever is right.
3. If nothing is wrong, press "Nothing to change".
"""
LONG = "The sky is blue because of the ocean reflecting. " + "It looks blue to us every day. " * 30
STARTED = []  # processes, which end with this one
ANSWERS = [
    "Teh answer 0 is <b>wrong</b> & its\nend \ud83d is\r\nmixed.\n\tTabbed\rlast",
    LONG,
    *[f"Teh answer {i} is wrong.\nSecond line." for i in range(2, 12)],
]


def write_data():
    with open("in.jsonl", "w", encoding="utf-8") as file:
        for i, answer in enumerate(ANSWERS):
            row = {"instruction": f"<script>document.title = 'hacked'</script> Question {i}?",
                   "input": f"Context of {i}." if i % 2 else "", "original": answer}
            file.write(json.dumps(row) + "\n")
    Path("guide.txt").write_text(GUIDE, encoding="utf-8")


def start_run(out):
    """-> the process of edit.py, the address of its page"""
    env = {**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": "", "PYTHONUNBUFFERED": "1"}
    python = os.environ.get("PYTHON", sys.executable)
    words = [python, str(ROOT / "edit.py"), "in.jsonl", f"--out={out}", "--editor=human",
             "--guide=guide.txt"]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    STARTED.append(process)
    for line in process.stdout:
        found = re.search(r"http://\S+", line)
        if found:
            return process, found[0]
    raise SystemExit("edit.py has not started")


class Browser:
    """Chromium, driven by keys"""

    def __init__(self, profile, width, dark):
        from selenium import webdriver
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={profile}", "--window-size=1300,1000"):
            options.add_argument(flag)
        if dark:
            options.add_argument("--blink-settings=preferredColorScheme=0")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        STARTED.append(service.process)
        self.width = width
        self.dark = dark
        self.set_size()

    def set_size(self, height=900):
        """A headless window is at least 500 pixels wide: a phone's width needs the protocol"""
        size = dict(width=self.width, height=height, deviceScaleFactor=1, mobile=self.width < 500)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, code, why=""):
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            if self.js(f"return {code}"):
                return
            time.sleep(0.05)
        note = self.js("return document.body.innerText")
        raise AssertionError(f"never: {code} {why}\n{note[:1500]}")

    def until_row(self, number):
        self.until(f"row && row.number === {number} && !busy", f"row {number}")

    def until_sent(self):
        self.until("row && $('field').value === known && !isSending", "the draft is on the server")

    def press(self, *keys):
        """Hold all but the last key, press the last one"""
        from selenium.webdriver import ActionChains
        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            chain.key_up(key)
        chain.perform()

    def select(self, word):
        """As if by shift and arrows: headless keys would take one call per character"""
        self.js("const f = $('field'), at = f.value.indexOf(arguments[0]);"
                "f.focus(); f.setSelectionRange(at, at + arguments[0].length)", word)

    def replace(self, word, new):
        self.select(word)
        self.press(new[0])
        for letter in new[1:]:
            self.press(letter)

    def field(self):
        """Half a character cannot travel through the driver: it is shown as U+FFFD"""
        return self.js("return $('field').value.toWellFormed()")

    def shot(self, name, *, whole=True):
        """The page from top to bottom, or what is in view. Nothing is too wide, and on a phone
        whatever can be pressed is 44 pixels high."""
        assert self.js("return document.documentElement.scrollWidth <= innerWidth"), "too wide"
        small = self.js("return [...document.querySelectorAll('button, input, summary')].filter("
                        "e => e.offsetHeight && e.offsetHeight < 43.9).map(e => e.textContent)")
        assert self.width > 500 or not small, small
        if whole:
            self.set_size(self.js("return Math.min(2400, document.documentElement.scrollHeight)"))
        scheme = "dark" if self.dark else "light"
        self.driver.save_screenshot(f"{name}_{self.width}_{scheme}.png")
        if whole:
            self.set_size()

    def top_and_bottom(self, name):
        """Where an element is in the window"""
        return self.js("const box = $(arguments[0]).getBoundingClientRect();"
                       "return [box.top, box.bottom]", name)

    def kill(self):
        """As a crash does: no event of the page runs"""
        pid = self.driver.capabilities["goog:processID"]
        os.kill(pid, signal.SIGKILL)
        self.driver.service.stop()


def dispatch(key, **more):
    """A keydown that the driver cannot make, as an input method or a mac makes it"""
    event = dict(key=key, bubbles=True, cancelable=True, **more)
    return f"$('field').dispatchEvent(new KeyboardEvent('keydown', {json.dumps(event)}))"


def first_rows(browser):
    """The name, the live diff, input methods, skip and back, questions, the other text"""
    from selenium.webdriver.common.keys import Keys
    browser.until("!$('name-form').hidden")
    browser.shot("1_name")
    for letter in "Ann":
        browser.press(letter)
    browser.press(Keys.ENTER)
    browser.until_row(1)
    assert browser.driver.title == "Minimal edits"
    assert "<script>" in browser.js("return $('instruction').textContent")
    assert browser.js("return document.activeElement.id") == "field"
    assert browser.js("return $('guide').textContent").startswith("How to edit")

    # A word, then an Escape that belongs to an input method or to a menu of the browser.
    browser.replace("Teh", "The")
    assert browser.js("return $('diff').querySelector('del').textContent") == "Teh"
    assert browser.js("return $('diff').querySelector('ins').textContent") == "The"
    browser.until_sent()
    for event in (dict(isComposing=True), dict(keyCode=229)):
        browser.js(dispatch("Escape", **event))
    browser.js("$('field').dispatchEvent(new MouseEvent('contextmenu', {bubbles: true}))")
    browser.press(Keys.ESCAPE)
    time.sleep(0.3)
    assert browser.js("return row.number") == 1
    assert browser.field().startswith("The")
    browser.shot("2_edited")

    # Skip, a replaced phrase is one change, the field grows; back to where one came from.
    browser.press(Keys.ESCAPE)
    browser.until_row(2)
    assert browser.js("return $('field').scrollHeight <= $('field').clientHeight + 1"), "no growth"
    browser.replace(" of the ocean reflecting", " air scatters it")
    changes = browser.js("return [...$('diff').children].map(part => part.tagName)")
    assert changes == ["SPAN", "DEL", "INS", "SPAN"], changes
    browser.shot("3_phrase")
    see_the_last_line(browser)
    browser.press(Keys.ALT, "b")
    browser.until_row(1)
    assert browser.field().startswith("The answer 0")
    browser.press(Keys.ALT, "r")
    browser.until("!busy && $('field').value.startsWith('Teh')")
    assert browser.js("return $('reset-text').textContent") == "My other text"
    browser.press(Keys.ALT, "r")
    browser.until("!busy && $('field').value.startsWith('The')")
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until_row(2)  # where one was before Back
    assert " air scatters it" in browser.field()
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until_row(3)

    # Questions: untouched, emptied, finish. The polite answer to each is a key.
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until("!$('ask').hidden")
    browser.shot("4_question")
    browser.press(Keys.ESCAPE)
    browser.until("$('ask').hidden && !busy")
    assert browser.js("return row.number") == 3
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until("!$('ask').hidden")
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until_row(4)
    browser.press(Keys.CONTROL, "a")
    browser.press(Keys.DELETE)
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until("!$('ask').hidden")
    browser.press(Keys.CONTROL, Keys.ENTER)  # the likely answer is no
    browser.until("$('ask').hidden && !busy")
    assert browser.js("return row.number") == 4
    browser.press(Keys.ALT, "r")
    browser.until("!busy && $('field').value.startsWith('Teh')")
    browser.press(Keys.ALT, "k")
    browser.until_row(5)
    browser.press(Keys.ALT, "t")  # take it back, and save it again
    browser.until_row(4)
    browser.press(Keys.ALT, "k")
    browser.until_row(5)
    browser.press(Keys.ALT, "q")
    browser.until("!$('ask').hidden")
    browser.press(Keys.ESCAPE)
    browser.until("$('ask').hidden && !busy")


def see_the_last_line(browser):
    """In a low window, the caret at the end of a long answer is above the buttons, and the buttons
    are reached by Tab without a jump of the page"""
    from selenium.webdriver.common.keys import Keys
    browser.set_size(420)
    browser.press(Keys.CONTROL, Keys.END)
    browser.press("x")
    browser.press(Keys.BACKSPACE)
    time.sleep(0.3)
    browser.shot("3_last_line", whole=False)
    last_line = browser.top_and_bottom("field")[1] - 12  # without the field's padding
    is_fixed = browser.js("return getComputedStyle($('buttons')).position === 'sticky'")
    limit = browser.top_and_bottom("buttons")[0] if is_fixed else 420
    assert last_line <= limit, (last_line, limit)
    before = browser.js("return scrollY")
    browser.press(Keys.TAB)
    assert browser.js("return document.activeElement.id") == "save"
    assert browser.js("return scrollY") == before or not is_fixed
    browser.shot("3_tab", whole=False)
    browser.press(Keys.SHIFT, Keys.TAB)
    assert browser.js("return document.activeElement.id") == "field"
    browser.set_size()


def reload_and_tabs(browser, url):
    """A reload keeps the row and its text; a second tab gets another row"""
    from selenium.webdriver.common.keys import Keys
    browser.replace("Teh", "RELOADED")
    browser.driver.refresh()
    browser.set_size()
    browser.until_row(5)
    assert browser.field().startswith("RELOADED")
    browser.js("window.open(arguments[0])", url)
    first, second = browser.driver.window_handles
    browser.driver.switch_to.window(second)
    browser.set_size()
    browser.until("row")
    number = browser.js("return row.number")
    assert number != 5
    browser.press(Keys.CONTROL, "a")
    for letter in "two":
        browser.press(letter)
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until(f"row && row.number !== {number} && !busy")
    browser.driver.close()
    browser.driver.switch_to.window(first)
    browser.press(Keys.CONTROL, Keys.ENTER)
    browser.until("row && row.number !== 5 && !busy")


def walk(width, dark):
    from selenium.webdriver.common.keys import Keys
    out = f"edits_{width}_{'dark' if dark else 'light'}.jsonl"
    process, url = start_run(out)
    profile = tempfile.mkdtemp()
    browser = Browser(profile, width, dark)
    browser.driver.get(url)
    first_rows(browser)
    reload_and_tabs(browser, url)

    # The server is killed while text is typed; it comes back, and the open page continues.
    here = browser.js("return row.number")
    browser.replace("Teh", "SERVER")
    process.kill()
    process.wait()
    browser.replace("wrong", "KILLED")
    browser.until("$('note').textContent.startsWith('The run has ended')")
    browser.shot("5_no_server")
    browser.set_size(320)
    browser.press(Keys.CONTROL, Keys.END)
    top, bottom = browser.top_and_bottom("note")
    browser.shot("5_note_stays", whole=False)
    assert browser.js("return scrollY") > 0 and 0 <= top < bottom <= 320, (top, bottom)
    browser.set_size()
    process, again = start_run(out)
    assert again == url
    browser.until_sent()
    browser.until("$('note').textContent === ''")

    # The browser is killed a moment after the last key. (A key is on the disk in about 10 ms, on a
    # busy machine in 150.)
    browser.replace("Second", "BROWSER")
    time.sleep(0.5)
    browser.kill()
    browser = Browser(profile, width, dark)
    browser.driver.get(url)
    browser.until("!$('page').hidden")  # the name is known
    browser.until("row && !busy")
    note = browser.js("return $('note').textContent + ' row ' + row.number")
    assert f"Row {here} has text of yours" in note, (here, note)
    browser.shot("6_after_a_crash")
    browser.press(Keys.ALT, "b")        # the old tab still counts as open
    browser.until_row(here)
    text = browser.field()
    assert "SERVER" in text and "KILLED" in text and "BROWSER" in text, text

    # The rest, to the end. Only typing: the tab order is the page's own.
    while browser.js("return Boolean(row)"):
        number = browser.js("return row.number")
        if browser.field().startswith("Teh"):
            browser.replace("Teh", "The")
        browser.press(Keys.CONTROL, Keys.ENTER)
        browser.until(f"!row && !busy || row && row.number !== {number} && !busy")
    browser.shot("7_done")
    assert browser.js("return $('all').textContent").startswith("All rows are done")
    browser.press(Keys.ALT, "q")
    browser.until("document.body.innerText.startsWith('Finished')")
    assert process.wait(30) == 0
    browser.driver.quit()

    # No row lost, none doubled, each byte that was not edited unchanged.
    rows = [json.loads(line) for line in Path(out).read_bytes().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == len(ANSWERS)
    first = ANSWERS[0].replace("\ud83d", "?")  # half a character cannot be written as UTF-8
    assert rows[0]["edited"] == "The" + first[3:], rows[0]
    assert rows[1]["edited"] == LONG.replace(" of the ocean reflecting", " air scatters it")
    assert rows[2]["unchanged"] and rows[3]["unchanged"]
    assert {row["who"] for row in rows} == {"Ann"}
    assert sorted(row["order"] for row in rows) == sorted({row["order"] for row in rows})
    print(f"{width} {'dark' if dark else 'light'}: as it should be; "
          f"{sum(row['seconds'] for row in rows):.0f} seconds of work", flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/walk")
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_data()
    try:
        for width in (1280, 390):
            for dark in (False, True):
                walk(width, dark)
    finally:
        for process in STARTED:
            process.kill()
