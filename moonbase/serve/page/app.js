// The page: one conversation with the server that it came from. This file wires the parts together.

import { Conversation } from "./conversation.js";
import { Settings } from "./settings.js";
import { ask, call, ServerError } from "./stream.js";
import { runDemo } from "./tools.js";
import { questionView, ReplyView } from "./view.js";

const MAX_ROUNDS = 6;
const REDRAW_MS = 40;
const SAVE_MS = 1000;
const NEAR_END = 90;  // pixels from the end within which the page follows what is written
const THEMES = ["system", "light", "dark"];

const $ = (id) => document.getElementById(id);
const field = $("message");
const conversation = new Conversation();
const settings = new Settings($("settings-form"));
let views = [];  // of each turn its view; a tool's result is part of the call's
let running = null;  // the AbortController of what is being answered
let editing = false;

// --- talking ---------------------------------------------------------------------------------------------------------

async function send() {
  const text = field.value.trim();
  if (running || !text || !settingsAreRight()) return;
  if (editing) forgetFrom(conversation.lastQuestion);
  leaveEditing();
  field.value = "";
  grow();
  conversation.add({ role: "user", content: text });
  show();
  toEnd();
  await answer();
}

/** Let the model answer, with as many rounds of tools as it takes. */
async function answer() {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  setRunning(true);
  try {
    for (let round = 0; ; round += 1) {
      const turn = await reply(round, signal);
      if (!wantsTools(turn)) break;
      if (round + 1 === MAX_ROUNDS) {
        fail(turn, `The model still calls tools after ${MAX_ROUNDS} rounds; ask again to let it go on.`);
        break;
      }
      if (!(await runTools(turn, signal))) break;
    }
  } finally {
    running = null;
    setRunning(false);
    conversation.save();
  }
}

/** Whether a reply ended with calls to run. Some servers say "stop" where a call was demanded of the model. */
function wantsTools({ calls, error, finish }) {
  if (error || !calls.length) return false;
  return finish === "tool_calls" || (finish === "stop" && calls.every((one) => one.name && isJson(one.arguments)));
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** One reply of the model, drawn while it grows. What goes wrong is kept in the turn. */
async function reply(round, signal) {
  const messages = conversation.messages(settings.get("system"));
  const turn = conversation.add({ role: "assistant", content: "", reasoning: "", calls: [], finish: null, usage: null,
                                  timing: { first: null, last: null, thought: null } });
  show();
  const view = views.at(-1);
  let drawn = 0;
  let saved = performance.now();
  let later = null;
  const draw = () => {
    later = null;
    drawn = performance.now();
    follow(() => view.update(true));
  };
  try {
    if (!$("model").value) await connect();
    await ask({ model: $("model").value || "moonbase", messages, stream: true, stream_options: { include_usage: true },
                ...settings.request(round) }, {
      key: apiKey(), signal,
      onChange: (now) => {
        Object.assign(turn, now);
        // Not at every token: drawing must not slow down reading.
        later ??= setTimeout(draw, Math.max(0, drawn + REDRAW_MS - performance.now()));
        if (performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          conversation.save();
        }
      },
    });
  } catch (error) {
    turn.finish = signal.aborted ? "stopped" : "error";
    if (!signal.aborted) {
      turn.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
      if (error.status === 401) askForKey();
      if (!(error instanceof ServerError)) console.error(error);
    }
  }
  clearTimeout(later);
  follow(() => view.update(false));
  conversation.save();
  say(turn.error ?? (turn.finish === "stopped" ? "Stopped" : turn.calls.length ? `Calls ${turn.calls.map((one) => one.name).join(", ")}`
    : `Reply finished. ${turn.usage?.completion_tokens ?? ""} tokens`));
  return turn;
}

/** Run the calls of a turn; false where the user stopped. Tools that the page does not have are asked of the user. */
async function runTools(turn, signal) {
  const view = views[conversation.turns.indexOf(turn)];
  for (const [number, one] of turn.calls.entries()) {
    const content = runDemo(one.name, one.arguments) ?? (await askUser(view.callViews[number], signal));
    if (content === null) return false;
    conversation.add({ role: "tool", id: one.id, name: one.name, content });
    follow(() => view.update(false));
  }
  conversation.save();
  return true;
}

function askUser(callView, signal) {
  return new Promise((resolve) => {
    signal.addEventListener("abort", () => {
      callView.forget();
      resolve(null);
    });
    follow(() => callView.ask(resolve));
    say(`The model calls ${callView.call.name} and waits for its result`);
  });
}

function fail(turn, message) {
  turn.error = message;
  follow(() => views[conversation.turns.indexOf(turn)].update(false));
}

function again() {
  if (running || conversation.lastQuestion < 0 || !settingsAreRight()) return;
  forgetFrom(conversation.lastQuestion + 1);
  answer();
}

function edit() {
  if (running || conversation.lastQuestion < 0) return;
  editing = true;
  $("editing").hidden = false;
  field.value = conversation.turns[conversation.lastQuestion].content;
  grow();
  field.focus();
}

function leaveEditing() {
  editing = false;
  $("editing").hidden = true;
}

function newChat() {
  running?.abort();
  leaveEditing();
  conversation.clear();
  views = [];
  $("log").replaceChildren();
  show();
  $("notice").hidden = true;
  field.focus();
}

// --- showing ---------------------------------------------------------------------------------------------------------

/** Build the views of turns that have none yet. */
function show() {
  const { turns } = conversation;
  $("welcome").hidden = turns.length > 0;
  for (let number = views.length; number < turns.length; number += 1) {
    const turn = turns[number];
    let view = null;
    if (turn.role === "user") {
      view = { element: questionView(turn, { onEdit: edit }) };
    } else if (turn.role === "assistant") {
      view = new ReplyView(turn, { onAgain: again, resultOf: (one) => conversation.result(turns.indexOf(turn), one.id) });
      view.update(running !== null && number === turns.length - 1);
    }
    if (view) $("log").append(view.element);
    views.push(view);
  }
  views.forEach((view, number) => {
    const last = turns[number].role === "user" ? number === conversation.lastQuestion : number > conversation.lastQuestion;
    view?.element.classList.toggle("last", last);
  });
}

function forgetFrom(number) {
  for (const view of views.splice(number)) view?.element.remove();
  conversation.cut(number);
  show();
}

function setRunning(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  document.body.classList.toggle("running", on);
  updateEnd();
}

function say(text) {
  $("status").textContent = text;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function atEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.clientHeight - window.scrollY < NEAR_END;
}

function toEnd() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

/** Do `change`; if the end of the page was in sight, it stays so. */
function follow(change) {
  const wasAtEnd = atEnd();
  change();
  if (wasAtEnd) toEnd();
  updateEnd();
}

function updateEnd() {
  $("to-end").hidden = atEnd() || !conversation.turns.length;
}

/** As many lines as the text has, up to a limit that the style sheet sets. */
function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// --- settings, key, theme --------------------------------------------------------------------------------------------

function settingsAreRight() {
  const wrong = settings.check();
  if (wrong) {
    openSettings(true);
    wrong.focus();
  }
  return !wrong;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("with-settings", open);
  // On a narrow screen the panel covers the conversation, which then must not take the focus.
  document.querySelector("main").inert = open && matchMedia("(max-width: 860px)").matches;
  // A field in focus would bring up the keyboard of a phone.
  const first = matchMedia("(hover: none)").matches ? $("close-settings") : $("settings-form").elements.temperature;
  if (open) first.focus({ preventScroll: true });
}

function closeSettings() {
  openSettings(false);
  $("open-settings").focus();
}

function apiKey() {
  try {
    return sessionStorage.getItem("moonbase.key") ?? "";
  } catch {
    return $("key").value;
  }
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  try {
    sessionStorage.setItem("moonbase.key", $("key").value);
  } catch {
    // The field itself holds it, then.
  }
  $("key-form").hidden = true;
  field.focus();
  const refused = await connect();
  if (!refused && conversation.turns.at(-1)?.finish === "error") again();
}

/** Ask which models there are. Returns whether a key is wanted. */
async function connect() {
  const select = $("model");
  try {
    const { data } = await (await call("v1/models", { key: apiKey() })).json();
    const names = data.map((model) => String(model.id));
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.disabled = names.length < 2;
    document.title = names.length === 1 ? `${names[0]} · moonbase` : "moonbase";
    notice("");
  } catch (error) {
    select.replaceChildren(new Option("not connected", ""));
    if (error.status === 401) {
      askForKey();
      return true;
    }
    notice(error instanceof ServerError ? error.message : "The server does not say which models it has.");
  }
  return false;
}

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme-name").textContent = `Theme: ${theme}`;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  showTheme(theme);
  try {
    localStorage.setItem("moonbase.theme", theme);
  } catch {
    // It holds until the page is left, then.
  }
}

// --- events ----------------------------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
field.addEventListener("input", grow);
field.addEventListener("keydown", (event) => {
  // While a word is being composed (Chinese, Japanese), Enter ends the word.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "ArrowUp" && !field.value) edit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort();
  else if (!$("settings").hidden) closeSettings();
  else if (editing) {
    leaveEditing();
    field.value = "";
    grow();
  }
});
$("stop").addEventListener("click", () => {
  running?.abort();
  field.focus();
});
$("new-chat").addEventListener("click", newChat);
$("theme").addEventListener("click", nextTheme);
$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("close-settings").addEventListener("click", closeSettings);
$("key-form").addEventListener("submit", useKey);
$("to-end").addEventListener("click", () => {
  toEnd();
  field.focus();
});
for (const button of document.querySelectorAll("[data-prompt]")) {
  button.addEventListener("click", () => {
    if ("tools" in button.dataset) settings.set("demo_tools", true);
    field.value = button.dataset.prompt;
    send();
    field.focus();
  });
}
addEventListener("scroll", updateEnd, { passive: true });
addEventListener("resize", updateEnd, { passive: true });
addEventListener("pagehide", () => {
  // What is being written ends with the page; that is no fault of the connection.
  running?.abort();
  conversation.save();
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((fold) => {
  fold.open = true;
}));

for (const turn of conversation.turns) {
  // A reload ended what was still being written.
  if (turn.role === "assistant" && !turn.finish) turn.finish = "stopped";
}
showTheme(document.documentElement.dataset.theme ?? "system");
try {
  show();
} catch {
  // What another version of this page had kept.
  newChat();
}
toEnd();
field.focus();
connect();
