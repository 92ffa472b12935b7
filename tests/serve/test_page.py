"""The page at `/`, in a real browser: what a user sees, does with the keyboard, and is protected from.

The other end is a server that plays a written part, so that reasoning, tool calls and troubles come when they are asked
for; `test_with_the_real_server` talks to the application and a model.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moonbase.data.tokenizer import train_tokenizer
from moonbase.serve.app import PAGE
from moonbase.synth.tools import TOOLS, run_tool
from tests.serve.browser import SHIFT, Browser, Page, find_browser
from tests.serve.page_server import PageServer, call, text

HOSTILE = ('<img src="/stolen" onerror="window.hacked=1"><script>window.hacked=2</script> '
           '[x](javascript:window.hacked=3) '
           '![y](/stolen-too) **<b onclick="window.hacked=4">bold</b>** `<i>code</i>`\n\n'
           '```html\n<svg onload="window.hacked=5">\n```\n\n- <a href="javascript:window.hacked=6">item</a>\n')


SLOW_WORDS = 20_000
"""Minutes: on no machine does a test meet the end of them."""


def slow(_: Any) -> Iterator[dict[str, Any]]:
    for number in range(SLOW_WORDS):
        yield from text(f"word{number} ", pause=0.01)


def think_and_call(_: Any) -> Iterator[dict[str, Any]]:
    yield from text("I have a calculator and use it.", 0.01, field="reasoning_content")
    yield from text("Let me compute that.")
    yield from call(0, "calculator", '{"expression": "(48 * 17 + 5) / 2"}')


def after_a_tool(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    results = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    yield from text(f"The tools say {' and '.join(results)}.")


def two_calls(_: Any) -> Iterator[dict[str, Any]]:
    yield from call(0, "convert", '{"value": 26.2, "unit": "mi", "to": "km"}')
    yield from call(1, "calculator", '{"expression": "alert(1)"}')


def hostile(_: Any) -> Iterator[dict[str, Any]]:
    yield from text(HOSTILE, field="reasoning_content")
    yield from text(HOSTILE)
    yield from call(0, "<img src=x onerror=window.hacked=7>", json.dumps({"q": HOSTILE}), id="functions.x:0")


MARKDOWN = """Some **bold**, *slanted* and `code *as is*`; 2 * 3 * 4 stays, snake_case_name too.

1. first
2. second
   - inner

```python
def f(x):
    return "**not bold**" + x
```
| a | b |
|---|---|
| 1 | 2 |

# Title
> said
"""

REPLIES: dict[str, Any] = {
    "hello": lambda _: text("Hello to you, dear reader of tests.", pause=0.01),
    "slow": slow,
    "compute": think_and_call,
    "both": two_calls,
    "own": lambda _: call(0, "look_up", '{"word": "moon"}'),
    "forever": lambda _: call(0, "calculator", '{"expression": "1+1"}'),
    "tool": after_a_tool,
    "hostile": hostile,
    "markdown": lambda _: iter([{"content": piece} for piece in MARKDOWN]),
    "stop with a call": lambda _: iter([*call(0, "calculator", '{"expression": "2 * 3"}'), {"finish": "stop"}]),
    "half a call": lambda _: iter([*call(0, "calculator", '{"expression": "2'), {"finish": "stop"}]),
    "long": lambda _: iter([*text("word"), {"finish": "length"}]),
    "busy": (429, "256 requests are waiting already", {"Retry-After": "3"}),
    "broken": (500, "line one\nline two", {}),
    "cut": lambda _: iter([*text("only half"), {"raw": ""}]),
    "midway": lambda _: iter([*text("only half"), {"raw": 'data: {"error": {"message": "the engine fell over"}}\n\n'}]),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium is installed; the page is not looked at")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def only_tab(browser: Browser) -> Page:
    return browser.page()


@pytest.fixture
def tab(only_tab: Page) -> Page:
    """An empty tab. One for all tests: every server has an origin of its own, and so storage of its own."""
    only_tab.fresh()
    return only_tab


@pytest.fixture
def serve() -> Iterator[Callable[..., PageServer]]:
    started: list[PageServer] = []

    def start(**options: Any) -> PageServer:
        started.append(PageServer(REPLIES, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(serve: Callable[..., PageServer]) -> PageServer:
    return serve()


@pytest.fixture
def page(tab: Page, server: PageServer) -> Iterator[Page]:
    """A tab that shows the page. Whatever a test did, no script failed and nothing was asked of another server."""
    tab.open(server.url)
    tab.wait("document.title == 'runs/tiny · moonbase'")
    yield tab
    assert not tab.complaints()
    assert all(address.startswith(server.url) for address in tab.addresses())


IDLE = "!document.body.classList.contains('running')"
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"


def say(page: Page, words: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.type(words)
    page.press("Enter")


def ask(page: Page, words: str) -> str:
    """Say something and wait for the whole answer; its text."""
    say(page, words)
    page.wait(f"document.querySelectorAll('.user').length && {IDLE}")
    return page.run(f"{LAST}.querySelector('.answer').innerText")


def shown(page: Page, selector: str) -> bool:
    return page.run(f"document.querySelector({json.dumps(selector)})?.checkVisibility() ?? false")


def module(page: Page, expression: str) -> Any:
    """The value of an expression in which `M` is the page's module of that name."""
    name, _, rest = expression.partition(".")
    return page.run(f"import('/{name}.js').then((M) => M.{rest})")


# --- talking ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_streamed_and_measured(page: Page, server: PageServer) -> None:
    seen = threading.Event()

    def halves(_: Any) -> Iterator[dict[str, Any]]:
        for number, delta in enumerate(text("Hello to you, dear reader of tests.")):
            if number == 3:
                assert seen.wait(120)
            yield delta

    server.replies = REPLIES | {"halves": halves}
    say(page, "halves")
    page.wait(f"{LAST}?.innerText.includes('you,')")
    assert page.run(f"{LAST}.getAttribute('aria-busy')") == "true"
    seen.set()
    page.wait(IDLE)
    assert page.run(f"{LAST}.querySelector('.answer').innerText") == "Hello to you, dear reader of tests."
    stats = page.run(f"{LAST}.querySelector('.stats').innerText")
    assert re.search(r"[\d,.]+ tokens/s\s+first token \d+(\.\d+)? m?s\s+40 tokens in, 7 out", stats), stats
    request = server.requests[-1]
    assert request["stream"] is True and request["stream_options"] == {"include_usage": True}
    assert request["model"] == "runs/tiny"
    assert request["messages"][-1] == {"role": "user", "content": "halves"}
    assert page.run(f"{LAST}.getAttribute('aria-busy')") == "false"
    assert page.run("document.querySelector('#status').textContent").startswith("Reply finished")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_reply_and_the_request(page: Page, server: PageServer, how: str) -> None:
    say(page, "slow")
    page.wait(f"{LAST}?.innerText.includes('word3')")
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    page.wait(IDLE)
    assert server.broken.wait(60), "the connection is closed, so that the server can stop too"
    said = page.run(f"{LAST}.innerText")
    assert "stopped" in said and "word3" in said
    assert page.run("document.activeElement.id") == "message" and not shown(page, "#stop")
    ask(page, "hello")
    sent = server.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].startswith("word0 word1"), "what had come is part of the conversation"


def test_reasoning_and_tools_are_folded_and_the_round_trip_is_made(page: Page, server: PageServer) -> None:
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    assert ask(page, "compute") == "The tools say 410.5."
    assert page.run("[...document.querySelectorAll('details:not([hidden])')].map((fold) => fold.open)") == [False] * 2
    first = "document.querySelector('.assistant')"
    assert not page.run(f"{first}.querySelector('.thoughts').checkVisibility({{contentVisibilityAuto: true}})")
    page.run("document.querySelectorAll('details:not([hidden]) summary').forEach((line) => line.click())")
    assert page.run(f"{first}.querySelector('.thoughts').innerText") == "I have a calculator and use it."
    said = page.run(f"{first}.querySelector('.call').innerText")
    assert "calculator" in said and '{"expression": "(48 * 17 + 5) / 2"}' in said and "410.5" in said
    assert "Thought for" in page.run(f"{first}.innerText")
    names = [tool["function"]["name"] for tool in server.requests[0]["tools"]]
    assert names == ["calculator", "convert"]
    assert server.requests[0]["tools"] == [TOOLS[name] for name in names], "declared as in the practice dialogues"
    assistant, result = server.requests[1]["messages"][-2:]
    assert assistant["reasoning_content"] == "I have a calculator and use it."
    assert assistant["content"] == "Let me compute that."
    assert assistant["tool_calls"] == [{"id": "functions.calculator:0", "type": "function", "function": {
        "name": "calculator", "arguments": '{"expression": "(48 * 17 + 5) / 2"}'}}]
    assert result == {"role": "tool", "tool_call_id": "functions.calculator:0", "content": "410.5"}


def test_two_calls_at_once_and_one_that_fails(page: Page, server: PageServer) -> None:
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    ask(page, "both")
    results = [message for message in server.requests[-1]["messages"] if message["role"] == "tool"]
    assert [result["tool_call_id"] for result in results] == ["functions.convert:0", "functions.calculator:1"]
    assert results[0]["content"] == "42.16"
    assert results[1]["content"] == "error: unexpected alert"
    assert page.run("document.querySelectorAll('.call.failed').length") == 1


def test_calls_that_end_with_stop(page: Page, server: PageServer) -> None:
    assert ask(page, "stop with a call") == "The tools say 6."
    ask(page, "half a call")
    assert len(server.requests) == 3 and "not answered" in page.run(f"{LAST}.innerText")


def test_the_user_plays_a_tool_that_the_page_has_not(page: Page, server: PageServer) -> None:
    say(page, "own")
    page.wait("document.activeElement.getAttribute('aria-label') == 'Result of look_up'")
    page.type("a <b>rock</b>")
    page.press("Enter")
    page.wait(IDLE)
    assert page.run(f"{LAST}.querySelector('.answer').innerText") == "The tools say a <b>rock</b>."
    assert server.requests[-1]["messages"][-1]["content"] == "a <b>rock</b>"


def test_a_call_that_is_left_unanswered_is_not_sent(page: Page, server: PageServer) -> None:
    say(page, "own")
    page.wait("document.querySelector('.result-form')")
    page.press("Escape")
    page.wait(IDLE)
    assert not page.run("document.querySelector('.result-form')") and shown(page, ".last .again")
    ask(page, "hello")
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["user", "user"]


def test_rounds_of_tools_end(tab: Page, serve: Callable[..., PageServer]) -> None:
    server = serve()
    server.replies = REPLIES | {"tool": REPLIES["forever"]}
    page = tab
    page.open(server.url)
    ask(page, "forever")
    assert len(server.requests) == 6
    assert "still calls tools after 6 rounds" in page.run(f"{LAST}.querySelector('.problem').innerText")


def test_again_and_edit(page: Page, server: PageServer) -> None:
    ask(page, "hello")
    ask(page, "long")
    assert "cut at the token limit" in page.run(f"{LAST}.innerText")
    page.click(".last .again")
    page.wait(f"{IDLE}")
    assert [message["content"] for message in server.requests[-1]["messages"][::2]] == ["hello", "long"]
    assert page.run("document.querySelectorAll('.turn').length") == 4
    # With the keyboard: up takes the last message back.
    page.run("document.querySelector('#message').focus()")
    page.press("ArrowUp")
    assert shown(page, "#editing") and page.run("document.querySelector('#message').value") == "long"
    page.press("Escape")
    assert not shown(page, "#editing") and page.run("document.querySelector('#message').value") == ""
    page.click(".user.last .edit")
    page.run("document.querySelector('#message').value = ''")
    assert ask(page, "hello").startswith("Hello to you")
    assert page.run("document.querySelectorAll('.turn').length") == 4
    assert [message["content"] for message in server.requests[-1]["messages"][::2]] == ["hello", "hello"]


def test_the_page_follows_what_is_written_unless_one_reads_above(page: Page) -> None:
    page.resize(700, 400)
    say(page, "slow")
    gap = "document.documentElement.scrollHeight - document.documentElement.clientHeight - scrollY"
    page.wait("document.documentElement.scrollHeight > 900")
    assert page.run(gap) < 60 and not shown(page, "#to-end")
    page.run("scrollTo(0, 0)")
    height = page.run("document.documentElement.scrollHeight")
    page.wait(f"document.documentElement.scrollHeight > {height}")
    page.wait("document.querySelector('#to-end').checkVisibility()")
    assert page.run("scrollY") == 0
    page.click("#to-end")
    page.wait(f"{gap} < 60")
    page.press("Escape")
    page.wait(IDLE)


def test_copy(page: Page, server: PageServer) -> None:
    for permission in ("clipboard-read", "clipboard-write"):
        page.browser.call("Browser.setPermission", permission={"name": permission}, setting="granted",
                          origin=server.url)
    ask(page, "markdown")
    for selector, expected in ((".last.assistant > .bar .quiet", MARKDOWN), (".user .bar .quiet", "markdown"),
                               (".code-head .quiet", 'def f(x):\n    return "**not bold**" + x')):
        # The button says so for a moment only, which a look now and then could miss.
        assert page.run(f"""new Promise((done) => {{
            const button = document.querySelector({json.dumps(selector)});
            new MutationObserver(() => done(button.innerText)).observe(button, {{childList: true}});
            button.click();
        }})""") == "Copied"
        assert page.run("navigator.clipboard.readText()") == expected


def test_one_of_several_models_is_chosen(tab: Page, serve: Callable[..., PageServer]) -> None:
    server = serve(models=("small", "large <b>one</b>"))
    tab.open(server.url)
    tab.wait("document.querySelector('#model').options.length == 2")
    tab.run("document.querySelector('#model').selectedIndex = 1")
    ask(tab, "hello")
    assert server.requests[0]["model"] == "large <b>one</b>"


# --- what a model writes ---------------------------------------------------------------------------------------------


def test_what_a_model_writes_is_text(page: Page) -> None:
    say(page, "hostile")
    page.wait("document.querySelector('.result-form')")
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("window.hacked") is None
    made = "img, script, a, b, i:not(.waiting i), svg:not(.quiet svg)"
    assert page.run(f"document.querySelectorAll('#log :is({made})').length") == 0
    assert not [address for address in page.addresses() if "stolen" in address]
    said = page.run(f"{LAST}.innerText")
    for part in ('<img src="/stolen" onerror="window.hacked=1">', "[x](javascript:window.hacked=3)",
                 '<svg onload="window.hacked=5">', "<img src=x onerror=window.hacked=7>"):
        assert part in said
    page.reload()
    page.wait("document.querySelector('.assistant')")
    assert page.run("window.hacked") is None


def test_what_a_user_writes_is_text_too(page: Page) -> None:
    server_refuses = '<img src="/stolen" onerror="window.hacked=1">'
    ask(page, server_refuses)
    assert page.run("document.querySelector('.said').innerText") == server_refuses
    assert "nothing is written for" in page.run(f"{LAST}.querySelector('.problem').innerText")
    assert page.run("window.hacked") is None and not [one for one in page.addresses() if "stolen" in one]


def test_markdown(page: Page) -> None:
    ask(page, "markdown")
    answer = f"{LAST}.querySelector('.answer')"
    found = {selector: page.run(f"[...{answer}.querySelectorAll('{selector}')].map((one) => one.textContent)")
             for selector in ("strong", "em", "p code", "pre", ".code-head > span", "ol > li", "ol ul li", "th", "td",
                              "h3", "blockquote")}
    assert found == {
        "strong": ["bold"], "em": ["slanted"], "p code": ["code *as is*"],
        "pre": ['def f(x):\n    return "**not bold**" + x'], ".code-head > span": ["python"],
        "ol > li": ["first", "secondinner"], "ol ul li": ["inner"], "th": ["a", "b"], "td": ["1", "2"], "h3": ["Title"],
        "blockquote": ["said"],
    }
    paragraph = page.run(f"{answer}.querySelector('p').textContent")
    assert paragraph == "Some bold, slanted and code *as is*; 2 * 3 * 4 stays, snake_case_name too."


def test_a_growing_text_ends_as_if_it_had_come_at_once(page: Page) -> None:
    """Whatever the pieces; and no prefix of anything makes a script fail."""
    signs = ["*", "**", "_", "`", "```", "\\n", "\\n\\n", "- ", "1. ", "> ", "# ", "|", "|-|-|", "a", " ", "word",
             "\\\\", "~~~", "  "]
    pick = random.Random(7)
    for _ in range(30):
        pieces = "".join(pick.choice(signs) for _ in range(60))
        same = page.run(f"""Promise.all([import('/markdown.js'), import('/dom.js')])
          .then(([{{Markdown}}, {{make}}]) => {{
            const text = "{pieces}", grown = make("div"), whole = make("div"), growing = new Markdown(grown);
            for (let end = 0; end <= text.length; end += 1) growing.update(text.slice(0, end));
            new Markdown(whole).update(text);
            return grown.innerHTML === whole.innerHTML;
        }})""")
        assert same, pieces


ENDLESS = ("*a " * 20000, "**" * 20000, "`" * 40000 + "x", "``x` " * 10000, "# " + "#" * 40000 + "x", "- " * 20000,
           "|" * 20000 + "\n" + "|-" * 20000 + "x", "> " * 20000, "_a" * 20000, "-" + " " * 40000 + "x", "\n" * 40000,
           "   " * 10000 + "x", "a|b\n-" + " " * 40000 + "|x", "1. " * 20000, "```" + " " * 40000, "\\" * 40000)


def test_no_text_makes_the_page_hang(page: Page) -> None:
    """Every step is linear: 40,000 characters of the worst kind are a moment, or are when the machine is not busy."""
    def milliseconds(words: str) -> float:
        return page.run(f"""Promise.all([import('/markdown.js'), import('/dom.js')])
          .then(([{{Markdown}}, {{make}}]) => {{
            const started = performance.now();
            new Markdown(make("div")).update({json.dumps(words)});
            return performance.now() - started;
        }})""")

    for words in ENDLESS:
        assert any(milliseconds(words) < 1500 for _ in range(5)), words[:20]


# --- settings --------------------------------------------------------------------------------------------------------


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.run(f"""(() => {{
            const field = document.querySelector('#settings-form').elements[{json.dumps(name)}];
            field.value = {json.dumps(value)};
            field.dispatchEvent(new Event("input", {{bubbles: true}}));
        }})()""")


def test_untouched_settings_are_left_to_the_server(page: Page, server: PageServer) -> None:
    ask(page, "hello")
    assert server.requests[0].keys() == {"model", "messages", "stream", "stream_options"}


def test_settings_are_sent_and_survive_a_reload(page: Page, server: PageServer) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    fill(page, temperature="0.3", top_p="0.9", max_tokens="77", seed="0", thinking="off", system="Be brief.",
         tools=json.dumps([tool]), tool_choice="required")
    for _ in range(2):
        ask(page, "hello")
        sent = server.requests[-1]
        assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.3, 0.9, 77, 0)
        assert sent["chat_template_kwargs"] == {"thinking": False}
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert sent["tools"] == [tool] and sent["tool_choice"] == "required"
        page.reload()
        page.wait("document.title.startsWith('runs/tiny')")
    page.click("#open-settings")
    page.click("#settings-form [type=reset]")
    ask(page, "hello")
    assert server.requests[-1].keys() == {"model", "messages", "stream", "stream_options"}


def test_a_forced_call_is_forced_once(page: Page, server: PageServer) -> None:
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    fill(page, tool_choice="required")
    ask(page, "compute")
    assert [request.get("tool_choice") for request in server.requests] == ["required", None]


def test_wrong_settings_are_named_and_nothing_is_sent(page: Page, server: PageServer) -> None:
    named = '[{"type": "function", "function": {"name": "%s"%s}}]'
    for name, value, complaint in (
        ("temperature", "3", "Temperature must be 0 to 2."), ("top_p", "0", "Top p must be more than 0."),
        ("max_tokens", "1.5", "Max tokens must be a whole number, 1 or more."), ("seed", "-1", "Seed must be"),
        ("tools", "[{]", "No valid JSON: "), ("tools", "{}", "A list of tools is wanted"),
        ("tools", '[{"type": "x"}]', 'tools[0].type must be "function"'),
        ("tools", named % ("a b", ""), "tools[0].function.name must be"),
        ("tools", named % ("a", ', "parameters": []'), "tools[0].function.parameters must be"),
        ("tools", f"[{(named % ('a', ''))[1:-1]}, {(named % ('a', ''))[1:-1]}]", "tools[1]: the name a occurs twice"),
    ):
        fill(page, **{name: value})
        page.run("document.querySelector('#message').value = ''")
        say(page, "hello")
        assert page.run(f"document.querySelector('#{name}-error').innerText").startswith(complaint)
        assert page.run("document.activeElement.name") == name
        assert page.run("document.activeElement.getAttribute('aria-invalid')") == "true"
        assert not server.requests and page.run("document.querySelector('#message').value") == "hello"
        fill(page, **{name: ""})
        assert page.run(f"document.querySelector('#{name}-error').innerText") == ""


# --- tools -----------------------------------------------------------------------------------------------------------


def by_python(expression: str) -> float:
    """What Python makes of the same expression, by its own grammar."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Mod: operator.mod, ast.Pow: operator.pow}

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.Constant)
        return float(node.value)

    return value(ast.parse(expression, mode="eval").body)


def test_the_pages_arithmetic_is_pythons(page: Page) -> None:
    pick = random.Random(3)

    def expression(depth: int) -> str:
        if depth == 0 or pick.random() < 0.2:
            return str(pick.choice([pick.randint(1, 99), round(pick.uniform(0.1, 9), 2)]))
        left, right = expression(depth - 1), expression(depth - 1)
        kind = pick.random()
        if kind < 0.15:
            return f"-{left}"
        if kind < 0.4:
            return f"({left} {pick.choice('+-*')} {right})"
        return f"{left} {pick.choice(['+', '-', '*', '/', '%', '** 2 +', '**-2*'])} {right}"

    expressions, expected = [], []
    while len(expressions) < 150:
        candidate = expression(4)
        try:
            result = by_python(candidate)
        except (ZeroDivisionError, OverflowError):
            continue
        if isinstance(result, float) and math.isfinite(result):
            expressions.append(candidate)
            expected.append(result)
    found = module(page, f"tools.{'demoTools'} && {json.dumps(expressions)}.map(M.arithmetic)")
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_arithmetic_says_what_is_wrong(page: Page) -> None:
    wrong = {"": "a number is missing at the end", "1 +": "a number is missing at the end",
             "(1": ") is missing at the end", "1 2": "unexpected 2", "1/0": "division by zero", "$x": "unexpected $",
             "alert(1)": "unexpected alert", "constructor": "unexpected constructor",
             "9**9**9": "the result is no finite number", "(" * 100 + "1": "too many levels",
             "2**" * 100 + "1": "too many levels", "1" * 500: "the expression is longer than 400 characters"}
    for expression, message in wrong.items():
        found = module(page, f"tools.runDemo('calculator', {json.dumps(json.dumps({'expression': expression}))})")
        assert found == f"error: {message}", expression
    assert module(page, "tools.runDemo('calculator', '[')").startswith("error: ")
    assert module(page, "tools.runDemo('constructor', '{}')") is None


def test_the_pages_tools_return_what_those_of_the_practice_dialogues_do(page: Page) -> None:
    pick = random.Random(5)
    pairs = [("km", "mi"), ("ft", "m"), ("kg", "lb"), ("oz", "g"), ("h", "min"), ("in", "cm")]
    for _ in range(40):
        unit, to = pick.choice(pairs)
        for name, arguments in (("calculator", {"expression": f"{pick.randint(1, 999)} {pick.choice('+-*/')} 7"}),
                                ("convert", {"value": pick.randint(1, 99), "unit": unit, "to": to})):
            found = module(page, f"tools.runDemo({json.dumps(name)}, {json.dumps(json.dumps(arguments))})")
            assert found == run_tool(name, arguments), arguments
    assert module(page, """tools.runDemo('convert', '{"value": 1, "unit": "km", "to": "kg"}')""").startswith("error: ")


# --- troubles --------------------------------------------------------------------------------------------------------


def test_troubles_are_one_line_in_place(page: Page) -> None:
    for words, complaint in (
        ("busy", "256 requests are waiting already. Try again in 3 s."), ("broken", "line one line two"),
        ("cut", "The reply broke off: the server closed the connection."), ("midway", "the engine fell over"),
    ):
        answer = ask(page, words)
        assert page.run(f"{LAST}.querySelector('.problem').innerText") == complaint
        assert answer == ("only half" if words in ("cut", "midway") else "")
        assert shown(page, ".last .again")
    assert ask(page, "hello").startswith("Hello to you")


def test_a_server_that_is_gone(tab: Page) -> None:
    server = PageServer(REPLIES)
    page = tab
    page.open(server.url)
    page.wait("document.title.startsWith('runs/tiny')")
    server.close()
    ask(page, "hello")
    problem = page.run(f"{LAST}.querySelector('.problem').innerText")
    assert problem == "The server cannot be reached. Is it still running?"


def test_a_key_is_asked_for_and_kept_for_the_tab_only(tab: Page, serve: Callable[..., PageServer]) -> None:
    server = serve(key="sesame")
    page = tab
    page.open(server.url)
    page.wait("document.activeElement.id == 'key'")
    page.type("wrong")
    page.press("Enter")
    page.wait("document.activeElement.id == 'key'")
    page.run("document.querySelector('#key').value = ''")
    page.type("sesame")
    page.press("Enter")
    page.wait("document.title.startsWith('runs/tiny')")
    assert not shown(page, "#key-form")
    assert ask(page, "hello").startswith("Hello to you")
    assert page.run("JSON.stringify({...localStorage})").count("sesame") == 0
    assert page.run("sessionStorage.getItem('moonbase.key')") == "sesame"


# --- what stays ------------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_conversation(page: Page, server: PageServer) -> None:
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    ask(page, "compute")
    before = page.run("document.querySelector('#log').innerText")
    page.reload()
    page.wait("document.querySelectorAll('.turn').length == 3")
    assert page.run("document.querySelector('#log').innerText") == before
    ask(page, "hello")
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('.turn').length") == 0 and shown(page, "#welcome")
    page.reload()
    assert shown(page, "#welcome")


def test_a_reload_in_the_middle_keeps_what_had_come(page: Page) -> None:
    say(page, "slow")
    page.wait(f"{LAST}?.innerText.includes('word5')")
    page.reload()
    assert "word5" in page.wait(f"{LAST}?.innerText")
    assert "stopped" in page.run(f"{LAST}.innerText") and page.run(IDLE)


def test_what_is_kept_is_bounded_and_may_be_spoilt(page: Page, server: PageServer) -> None:
    sizes = page.run("""import('/conversation.js').then(({Conversation}) => {
        const talk = new Conversation();
        for (let number = 0; number < 40; number += 1) {
            talk.add({role: "user", content: number + "x".repeat(40000)});
            talk.save();
        }
        const kept = JSON.parse(localStorage.getItem("moonbase.conversation"));
        return [talk.turns.length, kept.length, kept.at(-1).content.slice(0, 2), JSON.stringify(kept).length];
    })""")
    assert sizes[0] == 40 and 5 < sizes[1] < 15 and sizes[2] == "39" and sizes[3] <= 500_000
    call_of_nothing = {"role": "assistant", "content": "x", "calls": [None], "reasoning": "", "timing": {}}
    for spoilt in ("{", "[1, null, {}]", '[{"role": "assistant", "content": "x"}]', '{"a": 1}',
                   json.dumps([{"role": "user", "content": "y"}, call_of_nothing])):
        # Leaving the page saves what it shows; so the text is spoilt while the page is being left.
        page.run("addEventListener('pagehide', () => localStorage.setItem('moonbase.conversation', "
                 f"{json.dumps(spoilt)}))")
        page.reload()
        assert shown(page, "#welcome"), spoilt


# --- looks -----------------------------------------------------------------------------------------------------------

BRIGHTNESS = """getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)
    .reduce((sum, value) => sum + Number(value), 0) / 3"""


def test_dark_and_light(page: Page) -> None:
    page.scheme("dark")
    assert page.run(BRIGHTNESS) < 60
    page.scheme("light")
    assert page.run(BRIGHTNESS) > 230
    page.click("#theme")  # light, whatever the system says
    page.scheme("dark")
    assert page.run(BRIGHTNESS) > 230
    page.click("#theme")
    page.scheme("light")
    assert page.run(BRIGHTNESS) < 60
    page.reload()
    assert page.run(BRIGHTNESS) < 60, "the choice is kept"
    page.click("#theme")
    assert page.run(BRIGHTNESS) > 230 and page.run("document.querySelector('#theme').innerText") == "Theme: system"


CONTRAST = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour[3] > 200) return colour;
        }
        return rgb(getComputedStyle(document.body).backgroundColor);
    };
    const low = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !element.checkVisibility({visibilityProperty: true})) continue;
        if (element.closest("select, .unseen")) continue;
        const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push([element.className || element.tagName, (a + 0.05) / (b + 0.05)]);
    }
    return low;
})()"""


COLOURS_HAVE_CHANGED = """Promise.allSettled(document.getAnimations()
    .filter((one) => one instanceof CSSTransition).map((one) => one.finished))"""


def test_every_text_can_be_read(page: Page) -> None:
    """WCAG 2 AA: a contrast of 4.5 to 1."""
    def look() -> None:
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            page.run(COLOURS_HAVE_CHANGED)
            assert page.run(CONTRAST) == [], scheme

    look()
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    for words in ("compute", "markdown", "busy"):
        ask(page, words)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.click("#open-settings")
    fill(page, temperature="9")
    look()


def test_nothing_is_wider_than_the_screen(page: Page) -> None:
    def look() -> None:
        for width in (1440, 768, 360, 320):
            page.resize(width, 740, touch=width < 500)
            assert page.run("document.documentElement.scrollWidth") <= width
            box = page.run("(({left, right}) => [left, right])(document.querySelector('#composer')"
                           ".getBoundingClientRect())")
            assert box[0] >= 0 and box[1] <= width

    look()
    page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
    for words in ("compute", "markdown", "hello"):
        ask(page, words)
    look()
    page.click("#open-settings")
    look()
    box = page.run("(({left, right}) => [left, right])(document.querySelector('#settings').getBoundingClientRect())")
    assert box[0] >= 0 and box[1] <= 320


def test_on_paper(page: Page) -> None:
    ask(page, "markdown")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert not shown(page, "#composer") and not shown(page, ".top .actions") and not shown(page, ".last .again")
    assert shown(page, ".answer pre")
    page.call("Emulation.setEmulatedMedia", media="")


# --- keyboard --------------------------------------------------------------------------------------------------------


def test_everything_with_the_keyboard_alone(page: Page, server: PageServer) -> None:
    assert page.run("document.activeElement.id") == "message", "one can write at once"
    page.type("hel")
    page.press("Enter", SHIFT)
    page.type("lo")
    assert page.run("document.querySelector('#message').value") == "hel\nlo" and not server.requests
    page.run("document.querySelector('#message').value = ''")
    page.type("hello")
    page.press("Enter")
    page.wait(f"document.querySelector('.assistant') && {IDLE}")
    reached = []
    for _ in range(40):
        page.press("Tab")
        place = page.run("document.activeElement.id || document.activeElement.innerText")
        # The field of the message has no ring of its own: the frame around it changes its colour.
        ring = page.run("['body', '#message'].some((name) => document.activeElement.matches(name)) "
                        "|| getComputedStyle(document.activeElement).outlineStyle != 'none'")
        assert ring, f"no focus to be seen on {place}"
        reached.append(place)
    assert {"new-chat", "theme", "open-settings", "Copy", "Again", "Edit", "send", "message"} <= set(reached)
    page.run("document.querySelector('#open-settings').focus()")
    page.press("Enter")
    assert page.run("document.activeElement.name") == "temperature"
    assert page.run("document.querySelector('#open-settings').getAttribute('aria-expanded')") == "true"
    page.press("Escape")
    assert page.run("document.activeElement.id") == "open-settings" and not shown(page, "#settings")


def test_everything_has_a_name(page: Page) -> None:
    """What a screen reader would say of every control; an empty name says nothing."""
    ask(page, "compute")
    page.click("#open-settings")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "textbox", "combobox", "checkbox", "spinbutton", "DisclosureTriangle", "article", "log"}
    nameless = [node["role"]["value"] for node in nodes if not node["ignored"] and node["role"]["value"] in wanted
                and not node.get("name", {}).get("value")]
    assert not nameless
    assert {"log", "status", "main", "complementary"} <= {node["role"]["value"] for node in nodes}


# --- the real server -------------------------------------------------------------------------------------------------


def test_with_the_real_server(tab: Page) -> None:
    """The application, the engine and a tiny model: random words, but the whole way there and back."""
    from moonbase.engine import Engine
    from moonbase.engine.service import Service
    from moonbase.synth.dialogues import make_dialogues
    from tests.model.tiny import tiny_model
    from tests.serve.service_double import serving, until

    tokenizer = train_tokenizer([json.dumps(dialogue) for dialogue in make_dialogues(60)], 500)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048,
                       eos_token_id=tokenizer.eos_id).eval()
    engine = Engine(model, tokenizer, tokenizer.eos_ids, max_running=4, cache_tokens=4096)
    service = Service(engine)
    with serving(service, tokenizer, context_length=2048, api_keys=("sesame",), model_names=("tiny",)) as running:
        page = tab
        page.open(running.url + "/")
        page.wait("document.activeElement.id == 'key'")
        page.type("sesame")
        page.press("Enter")
        page.wait("document.title == 'tiny · moonbase'")
        fill(page, max_tokens="40", temperature="1", seed="5")
        page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
        first = ask(page, "What is 48 * 17?")
        assert "tokens in, " in page.run("document.querySelector('.stats').innerText")
        fill(page, tool_choice="required", max_tokens="200")
        page.click("#new-chat")
        ask(page, "What is 48 * 17?")
        assert page.run("document.querySelector('.call-name').innerText") in ("calculator", "convert")
        assert "calculator" in json.dumps(TOOLS) and not page.run("document.querySelector('.problem:not([hidden])')")
        fill(page, tool_choice="", max_tokens="40")
        page.click("#new-chat")
        assert ask(page, "What is 48 * 17?") == first, "the same seed"
        fill(page, max_tokens="5000")
        ask(page, "Too much")
        assert "the model's context is 2048 tokens" in page.run(f"{LAST}.querySelector('.problem').innerText")
        fill(page, max_tokens="1500", temperature="2")
        say(page, "Go on and on")
        page.wait(f"{LAST}.querySelector('.answer').innerText.length > 10")
        page.press("Escape")
        until(lambda: service.statistics.running == 0)
        assert not page.complaints()
        assert all(address.startswith(running.url) for address in page.addresses())


# --- the files -------------------------------------------------------------------------------------------------------


def test_files_are_small_and_bring_nothing_from_elsewhere() -> None:
    """No test of a browser: also where none is installed, the page stays what it promises."""
    for path in PAGE.iterdir():
        if path.suffix not in (".html", ".js", ".css", ".svg"):
            continue
        content = path.read_text(encoding="utf-8")
        assert len(content.splitlines()) < 500, path.name
        addresses = re.findall(r"""["'(]((?:https?:|data:|//)[^"')\s]+)""", content)
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path.name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in content, f"{path.name}: {word}"
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script>|\sstyle=|\son\w+=", html)
