"""The page in a real browser, over a real server and a double of the engine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from support.clients.browser import ENTER, ESCAPE, LEFT, RIGHT, Browser, missing
from support.doubles.server import ANSWER, LiveServer

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(drain_timeout=0.2) as server:
        yield server


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(window: Browser, live: LiveServer) -> Iterator[Browser]:
    """A fresh page whose console must stay clean."""
    visit(window, live)
    window.run("localStorage.clear(); sessionStorage.clear()")
    visit(window, live)
    window.errors()
    yield window
    live.engine.behave()
    assert window.errors() == []


def visit(browser: Browser, live: LiveServer, view: str = "chat") -> None:
    browser.open("about:blank")
    browser.open(f"{live.url}/#{view}")
    browser.until(lambda: browser.text("#status .word") in ("ready", "live"))


def ask(page: Browser, text: str = "hello", answers: int = 1) -> None:
    page.type("#prompt", text + ENTER)
    page.until(lambda: page.count(".assistant.done") == answers)


def set_parameter(page: Browser, name: str, value: str) -> None:
    page.run(
        "const f = document.getElementById('parameters').elements[arguments[0]]; f.value = arguments[1];"
        "f.dispatchEvent(new Event('input', {bubbles: true}))", name, value,
    )  # fmt: skip


def tokens_of(live: LiveServer, text: str) -> list[int]:
    return live.tokenizer.encode(text)


def test_an_answer_streams_in_with_its_figures(page: Browser, live: LiveServer) -> None:
    set_parameter(page, "max_tokens", str(len(tokens_of(live, ANSWER))))
    ask(page)
    assert page.text(".assistant .text") == ANSWER
    figures = page.text(".assistant .figures")
    assert "first token" in figures and "tokens/s" in figures and "cut at the limit" in figures
    assert f"{len(tokens_of(live, ANSWER))} tokens" in figures
    assert page.run("return document.activeElement.id") == "prompt"
    assert page.text("#model") == "tiny"


def test_parameters_and_the_conversation_are_sent_and_kept(page: Browser, live: LiveServer) -> None:
    given = {
        "max_tokens": "5",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "7",
        "min_p": "0.1",
        "seed": "3",
    }
    for name, value in given.items():
        set_parameter(page, name, value)
    set_parameter(page, "system", "Be brief.")
    ask(page, "one")
    ask(page, "two", answers=2)
    request = live.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (5, 7, 3)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    prompt = live.tokenizer.decode(request.prompt_token_ids)
    order = [prompt.find(part) for part in ("Be brief.", "one", ANSWER[:3], "two")]
    assert -1 not in order and order == sorted(order)
    visit(page, live)
    assert page.run("return document.getElementById('parameters').elements.temperature.value") == "0.5"


def test_of_several_models_the_next_answers_is_chosen(page: Browser) -> None:
    stream(page, ["hello"])
    page.run("""
        const further = window.fetch;
        window.fetch = async (path, options) => path === '/v1/models'
            ? new Response('{"data": [{"id": "org/first"}, {"id": "org/second"}]}') : further(path, options);
    """)
    page.click("#status")  # connects again behind the dialog
    page.click("#key-dialog [value=ok]")
    page.until(lambda: page.count("select#model option") == 2)
    ask(page)
    page.run("const s = document.getElementById('model'); s.value = 'org/second';"
             "s.dispatchEvent(new Event('change'))")  # fmt: skip
    ask(page, answers=2)
    assert page.run("return window.sent.map((body) => body.model)") == ["org/first", "org/second"]
    assert page.run("return document.title") == "org/second · rvLLM"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_aborts_the_request(page: Browser, live: LiveServer, how: str) -> None:
    live.engine.pace = 0.05
    before = len(live.engine.aborted)
    page.type("#prompt", "hello" + ENTER)
    page.until(lambda: len(page.text(".assistant .text")) > 5)
    if how == "button":
        page.click("#stop")
    else:
        page.keys(ESCAPE)
    page.until(lambda: len(live.engine.aborted) == before + 1)
    page.until(lambda: "stopped" in page.text(".assistant .figures"))
    assert page.run("return document.getElementById('send').hidden") is False


def test_token_probabilities_on_hover_and_by_keyboard(page: Browser, live: LiveServer) -> None:
    set_parameter(page, "max_tokens", "6")
    page.click("input[name=logprobs]")
    ask(page)
    assert page.count(".token") == 6
    assert page.run("return [...document.querySelectorAll('.token')].map(t => t.textContent).join('')")
    page.hover(".token:nth-child(2)")
    assert page.text("#token-tip").count("%") == 5
    assert page.text("#token-tip .chosen").endswith("60.7 %"), "exp(-0.5)"
    page.run("document.querySelector('.token').focus()")
    page.keys(RIGHT + RIGHT + LEFT)
    assert page.run("return [...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 1
    page.click(".assistant footer .quiet")
    assert page.count(".assistant .text:not([hidden])") == 1 and page.count(".tokens[hidden]") == 1


def test_what_goes_wrong_is_said_in_the_conversation(page: Browser, live: LiveServer) -> None:
    live.engine.error = "the engine is tired <b>today</b>"
    ask(page)
    assert page.text(".assistant [role=alert]") == "the engine is tired <b>today</b>"
    live.engine.error = None
    set_parameter(page, "max_tokens", "3")
    ask(page, answers=2)
    assert page.count("[role=alert]") == 1
    page.errors()  # Chromium notes the 500


def test_thoughts_are_shown_apart_and_not_sent_back(page: Browser) -> None:
    page.run("""
        window.sent = [];
        const say = (delta) => 'data: ' + JSON.stringify({choices: [{index: 0, delta}]}) + '\\n\\n';
        const server = window.fetch;
        window.fetch = async (path, options) => {
            if (path !== '/v1/chat/completions') return server(path, options);
            window.sent.push(JSON.parse(options.body));
            const told = say({reasoning_content: 'Hm <b>so</b>. '}) + say({content: 'Yes.'});
            return new Response(told + 'data: [DONE]\\n\\n');
        };
    """)
    ask(page, "one")
    assert page.run("return document.querySelector('.thinking div').textContent") == "Hm <b>so</b>."
    assert page.run("return document.querySelector('.thinking').open") is False
    assert page.text(".assistant .text") == "Yes."
    ask(page, "two", answers=2)
    said = [message["content"] for message in page.run("return window.sent[1].messages")]
    assert said == ["one", "Yes.", "two"]


ASKED_MARKDOWN = """## A table

| a | b |
|---|---|
| 1 | `2` |

```python
def f(x):
    return x < 2
```

- one

- two

The mass is $m^2$ <b>x</b>."""


def stream(page: Browser, pieces: list[str]) -> None:
    """From now on the model says these pieces; everything else still goes to the server."""
    page.run("""
        window.serverFetch ??= window.fetch;
        window.sent = [];
        const event = (content) => ({choices: [{index: 0, delta: {content}}]});
        const told = arguments[0].map((content) => 'data: ' + JSON.stringify(event(content)) + '\\n\\n');
        window.fetch = async (path, options) => {
            if (path !== '/v1/chat/completions') return window.serverFetch(path, options);
            window.sent.push(JSON.parse(options.body));
            return new Response(told.join('') + 'data: [DONE]\\n\\n');
        };
    """, pieces)  # fmt: skip


def test_markdown_becomes_elements_and_stays_text(page: Browser) -> None:
    stream(page, [ASKED_MARKDOWN[i : i + 7] for i in range(0, len(ASKED_MARKDOWN), 7)])
    ask(page, "show me")
    page.until(lambda: page.count(".assistant .text math"))
    assert page.text(".assistant .text h2") == "A table"
    assert page.count(".assistant .text .scroll td code") == 1
    assert page.text(".assistant .code pre") == "def f(x):\n    return x < 2\n"
    assert page.text(".assistant .code-bar span") == "python"
    assert page.count(".assistant .text ul") == 1, "a list with empty lines is one list"
    assert page.count(".assistant .text b") == 0 and "<b>x</b>" in page.text(".assistant .text")
    colour = "return getComputedStyle(document.querySelector('.code .k')).color"
    assert page.run(colour) != page.run("return getComputedStyle(document.querySelector('.code pre')).color")


def test_what_still_grows_is_plain_and_code_has_its_frame(page: Browser) -> None:
    made = page.run("""return (async (text) => {
        const { plain, finishedUpTo } = await import('/web/markdown.js');
        const node = document.createElement('div');
        node.append(plain(text));
        return [node.querySelector('p').textContent, node.querySelector('pre').textContent,
                node.querySelector('.code-bar span').textContent, finishedUpTo(text, 0)];
    })(arguments[0])""", "so **it** is\n\n```python\nif a < b:\n\n    pass")  # fmt: skip
    assert made == ["so **it** is", "if a < b:\n\n    pass", "python", len("so **it** is\n\n")]


def test_conversations_are_kept_and_opened_again(page: Browser, live: LiveServer) -> None:
    set_parameter(page, "max_tokens", "4")
    ask(page, "first <i>words</i>")
    page.click("#clear")
    ask(page, "second words")
    visit(page, live)
    titles = "return [...document.querySelectorAll('#saved-list .open')].map((b) => b.textContent)"
    assert page.run(titles) == ["second words", "first <i>words</i>"]
    page.click("#saved-list li:nth-child(2) .open")
    assert page.text(".user .text") == "first <i>words</i>" and page.count(".assistant.done") == 1
    ask(page, "more", answers=2)
    assert page.run(titles) == ["first <i>words</i>", "second words"]
    page.click("#saved-list li:nth-child(1) .quiet")
    assert page.run(titles) == ["second words"]


def test_an_answer_is_copied_as_a_command(page: Browser, live: LiveServer) -> None:
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    set_parameter(page, "max_tokens", "4")
    ask(page, 'it\'s "quoted" & $HOME')
    page.run("[...document.querySelectorAll('.assistant footer button')].at(-1).click()")
    command = page.until(lambda: page.run("return window.copied"))
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=20)
    answer = json.loads(said.stdout)
    assert answer["usage"]["completion_tokens"] == 4
    assert 'it\'s "quoted" & $HOME' in live.tokenizer.decode(live.engine.requests[-1].prompt_token_ids)


def test_schemas_and_tools_go_with_a_request_and_results_go_back(page: Browser) -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    page.run("""
        window.sent = [];
        const call = arguments[0];
        const server = window.fetch;
        window.fetch = async (path, options) => {
            if (path !== '/v1/chat/completions') return server(path, options);
            window.sent.push(JSON.parse(options.body));
            const delta = window.sent.length === 1 ? {tool_calls: [call]} : {content: 'Done.'};
            const event = JSON.stringify({choices: [{index: 0, delta}]});
            return new Response('data: ' + event + '\\n\\ndata: [DONE]\\n\\n');
        };
    """, call)  # fmt: skip
    page.click("#extras summary")
    set_parameter(page, "schema", "{nonsense")
    page.type("#prompt", "hello" + ENTER)
    assert page.run(
        "return [window.sent.length, document.querySelector('[name=schema]').validity.valid]"
    ) == [0, False]
    set_parameter(page, "schema", '{"type": "object"}')
    set_parameter(page, "tools", '[{"name": "f", "parameters": {}}]')
    page.click("#send")
    page.until(lambda: page.count(".results textarea"))
    assert page.text(".calls") == 'f({"x": 1})'
    page.type(".results textarea", "42")
    page.click(".results button")
    page.until(lambda: page.count(".assistant.done") == 2)
    first, second = page.run("return window.sent")
    assert first["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert first["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": "call_1", "content": "42"}


def test_events_survive_every_chunking(page: Browser) -> None:
    seen = page.run("""return (async () => {
        const { events } = await import('/web/api.js');
        const text = 'data: {"a": "日本 😀"}\\n\\n: note\\n\\ndata: {"a": 2}\\n\\ndata: [DONE]\\n\\n';
        const bytes = new TextEncoder().encode(text);
        const all = [];
        for (let size = 1; size <= bytes.length; size += 1) {
            const body = new ReadableStream({ start(c) {
                for (let i = 0; i < bytes.length; i += size) c.enqueue(bytes.slice(i, i + size));
                c.close();
            } });
            const got = [];
            for await (const event of events({ body })) got.push(event.a);
            all.push(JSON.stringify(got));
        }
        return [...new Set(all)];
    })()""")
    assert seen == ['["日本 😀",2]']


def test_the_engine_view_is_live_and_asks_only_while_seen(page: Browser, live: LiveServer) -> None:
    asked = live.engine.asked_for_state
    live.engine.held = True
    page.type("#prompt", "hello" + ENTER)
    page.until(lambda: live.engine.open)
    assert live.engine.asked_for_state == asked, "the chat alone asks nothing of the engine"
    page.click("#tab-engine")
    page.until(lambda: page.count("#engine tbody tr .swatch") == 1)
    request = next(iter(live.engine.open))
    assert page.run("return document.querySelector('#engine tbody code').title") == request
    assert "decoding" in page.text("#engine tbody")
    assert page.text("#status .word") == "live"
    tiles = page.text("#engine .tiles")
    assert "10 %" in tiles and "1 of 10" in tiles and "250 tokens/s" in tiles, "one sequence in 4 ms"
    assert "gemm_bf16" in page.text("#engine") and "the only one" in page.text("#engine")
    colour = page.run("""const c = document.querySelector('canvas'), d = c.getContext('2d');
        const at = (i) => [...d.getImageData(i * 16 + 7, 7, 1, 1).data].slice(0, 3).join();
        return [at(0) === at(1), at(0) === at(3), at(7) === at(8), at(7) === at(3)]""")
    assert colour == [True, False, True, False], "one colour a sequence; cached and empty differ"
    page.hover(".map canvas")
    assert page.text(".map .label").startswith("Block ")
    page.run("document.querySelector('.map canvas').focus()")
    page.keys(RIGHT)
    assert page.text(".map .label") == f"Block 0: held by {request}"
    page.keys(RIGHT * 7)
    assert page.text(".map .label") == "Block 7: free, holds a reusable prefix"
    matrices = page.run(
        "return [...document.querySelectorAll('[aria-label=Matrices] tr')].map(r => r.innerText)"
    )
    assert [row.split("\t")[:3] for row in matrices[1:]] == [
        ["qkv", "native", "gemm_bf16"],
        ["lm_head", "native", "gemm_bf16"],
    ]
    assert "at 90 % of the limit" in page.text("#engine")
    live.engine.held = False
    page.until(lambda: "No request is alive" in page.text("#engine"))
    page.click("#tab-chat")
    page.until(lambda: page.run("return document.getElementById('engine').hidden"))
    settled = live.engine.asked_for_state
    page.run("return new Promise((done) => setTimeout(done, 1300))")
    assert live.engine.asked_for_state <= settled + 1


def test_tabs_by_keyboard(page: Browser) -> None:
    page.run("document.getElementById('tab-chat').focus()")
    page.keys(RIGHT)
    assert page.run("return [document.activeElement.id, location.hash]") == ["tab-engine", "#engine"]
    assert page.run("return document.getElementById('chat').hidden") is True
    page.keys(LEFT)
    assert page.run("return [document.activeElement.id, location.hash]") == ["tab-chat", "#chat"]


def test_everything_has_a_name(page: Browser) -> None:
    for view in ("chat", "engine"):
        page.run("location.hash = arguments[0]", view)
        page.until(
            lambda view=view: page.run("return document.getElementById(arguments[0]).hidden", view) is False
        )
        nameless = page.run("""
            return [...document.querySelectorAll('button, input, textarea, [role=img], [tabindex]')]
                .filter((n) => n.offsetParent !== null && !n.closest('pre'))
                .filter((n) => !(n.innerText?.trim() || n.ariaLabel || n.title || n.labels?.length))
                .map((n) => n.outerHTML)""")
        assert nameless == []


def overflow(browser: Browser) -> Any:
    return browser.run("return document.documentElement.scrollWidth - innerWidth")


def test_dark_on_a_phone() -> None:
    with LiveServer(drain_timeout=0.2) as live, Browser(390, 844, dark=True) as phone:
        visit(phone, live)
        assert overflow(phone) <= 0
        assert phone.run("return document.getElementById('settings').open") is False
        set_parameter(phone, "max_tokens", "5")
        ask(phone, "hello " * 30)
        assert overflow(phone) <= 0
        background = phone.run(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert sum(background) < 150
        live.engine.held = True
        phone.type("#prompt", "again" + ENTER)
        phone.until(lambda: live.engine.open)
        phone.click("#tab-engine")
        phone.until(lambda: phone.count("#engine tbody tr"))
        assert overflow(phone) <= 0
        assert phone.run("return document.querySelector('.tiles').offsetHeight") > 150


def test_the_key_is_asked_for_and_used() -> None:
    with LiveServer(api_key="secret", drain_timeout=0.2) as live, Browser() as browser:
        browser.open(live.url)
        browser.until(lambda: browser.run("return document.getElementById('key-dialog').open"))
        assert browser.text("#status .word") == "key needed"
        browser.type("#key", "secret" + ENTER)
        browser.until(lambda: browser.text("#status .word") == "ready")
        browser.click("#tab-engine")
        browser.until(lambda: browser.text("#status .word") == "live")
