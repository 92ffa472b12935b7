// How a turn looks. A view is made once and told when its turn has changed.

import { copyButton, iconButton, make } from "./dom.js";
import { Markdown } from "./markdown.js";
import { speed } from "./stream.js";

/** What the user wrote. `onEdit`: called to take it back into the field. */
export function questionView(turn, { onEdit }) {
  const bar = make("div", { class: "bar" }, copyButton(() => turn.content), iconButton("edit", "Edit", onEdit, { class: "quiet edit" }));
  return make("article", { class: "turn user", "aria-label": "You" },
              make("div", { class: "said", dir: "auto" }, turn.content), bar);
}

/** A reply: reasoning and tool calls folded, the text, what it took. */
export class ReplyView {
  /** `turn` is kept and read again by `update`. `actions`: {onAgain, onResult(call, text), resultOf(call), model}. */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.thoughts = make("pre", { class: "thoughts", dir: "auto" });
    this.thoughtTitle = make("span", {}, "Thinking…");
    this.reasoning = make("details", { class: "fold reasoning", hidden: true },
                          make("summary", {}, this.thoughtTitle), this.thoughts);
    this.answer = make("div", { class: "answer" });
    this.markdown = new Markdown(this.answer);
    this.calls = make("div", { class: "calls" });
    this.callViews = [];
    this.waiting = make("div", { class: "waiting", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
    this.error = make("div", { class: "problem", role: "alert", hidden: true });
    this.stats = make("span", { class: "stats" });
    this.copy = copyButton(() => turn.content);
    this.bar = make("div", { class: "bar" }, this.copy,
                    iconButton("again", "Again", actions.onAgain, { class: "quiet again", title: "Answer once more" }),
                    this.stats);
    this.element = make("article", { class: "turn assistant", "aria-label": "Reply" },
                        this.reasoning, this.answer, this.calls, this.waiting, this.error, this.bar);
  }

  /** Show the turn as it is now. `live`: it still grows. */
  update(live) {
    const { turn } = this;
    this.element.setAttribute("aria-busy", String(live));
    this.element.classList.toggle("live", live);
    this.showReasoning(live);
    this.markdown.update(turn.content);
    turn.calls.forEach((call, number) => {
      this.callViews[number] ??= this.addCall(call);
      this.callViews[number].update(live);
    });
    this.waiting.hidden = !live || Boolean(turn.content || turn.calls.length);
    this.error.hidden = !turn.error;
    if (turn.error && this.error.textContent !== turn.error) this.error.replaceChildren(turn.error);
    this.bar.hidden = live;
    this.copy.hidden = !turn.content;
    // Between two rounds of tools there is nothing to copy or to ask again.
    const answered = turn.calls.every((call) => this.actions.resultOf(call) !== null);
    this.element.classList.toggle("step", !live && turn.calls.length > 0 && answered);
    this.stats.replaceChildren(...statistics(turn).map(([text, title]) => make("span", { title }, text)));
  }

  showReasoning(live) {
    const { reasoning, timing, content, calls } = this.turn;
    this.reasoning.hidden = !reasoning;
    if (this.thoughts.textContent !== reasoning) this.thoughts.textContent = reasoning;
    const thinking = live && !content && !calls.length;
    this.reasoning.classList.toggle("active", thinking);
    const took = timing.thought ?? timing.last - timing.first;
    this.thoughtTitle.textContent = thinking ? "Thinking…" : `Thought for ${seconds(took)}`;
  }

  addCall(call) {
    const view = new CallView(call, this.actions);
    this.calls.append(view.element);
    return view;
  }
}

class CallView {
  constructor(call, actions) {
    this.call = call;
    this.actions = actions;
    this.name = make("span", { class: "call-name" });
    this.outcome = make("span", { class: "call-outcome" });
    this.given = make("pre", { tabindex: "0", dir: "ltr" });
    this.result = make("pre", { tabindex: "0", dir: "auto" });
    this.resultPart = make("div", { hidden: true }, make("h4", {}, "Result"), this.result);
    this.form = null;
    this.element = make("details", { class: "fold call" }, make("summary", {}, this.name, this.outcome),
                        make("h4", {}, "Arguments"), this.given, this.resultPart);
  }

  update(live) {
    const result = this.actions.resultOf(this.call);
    this.name.textContent = this.call.name || "…";
    this.given.textContent = pretty(this.call.arguments);
    this.resultPart.hidden = result === null;
    this.result.textContent = result ?? "";
    const failed = result?.startsWith("error:") ?? false;
    this.element.classList.toggle("failed", failed);
    this.element.classList.toggle("active", live || this.form !== null);
    this.outcome.textContent = live ? "writing…" : this.form ? "waits for your result"
      : result === null ? "not answered" : `→ ${result.replace(/\s+/g, " ").slice(0, 80)}`;
  }

  /** Ask the user for the result of a tool that the page does not have. */
  ask(onResult) {
    const field = make("textarea", { rows: "2", "aria-label": `Result of ${this.call.name}`, placeholder: "What the tool returns" });
    const submit = (event) => {
      event.preventDefault();
      this.form.remove();
      this.form = null;
      onResult(field.value);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    });
    this.form = make("form", { class: "result-form", onsubmit: submit }, field,
                     make("button", { type: "submit", class: "plain" }, "Send result"));
    this.element.append(this.form);
    this.element.open = true;
    this.update(false);
    field.focus();
  }

  /** Nobody waits for a result any more. */
  forget() {
    this.form?.remove();
    this.form = null;
    this.update(false);
  }
}

/** What a reply took, as [text, explanation]. */
function statistics(turn) {
  const { usage, timing, finish } = turn;
  const found = [];
  const rate = speed(turn);
  if (rate) found.push([`${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`, "After the first token"]);
  if (timing.first !== null) found.push([`first token ${seconds(timing.first)}`, "From sending to the first token, seen from this page"]);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    found.push([`${usage.prompt_tokens} tokens in, ${usage.completion_tokens} out`,
                `Read and written${cached ? `; ${cached} of those read came from the cache` : ""}`]);
  }
  if (finish === "length") found.push(["cut at the token limit", "Raise max tokens in the settings"]);
  if (finish === "stopped") found.push(["stopped", "Stopped before it was finished"]);
  return found;
}

function seconds(milliseconds) {
  const value = Math.max(0, milliseconds || 0) / 1000;
  return `${value < 9.95 ? value.toFixed(value < 0.995 ? 2 : 1) : Math.round(value)} s`;
}

/** Arguments laid out over lines where they are long and JSON; as they are otherwise. */
function pretty(text) {
  if (text.length <= 60) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
