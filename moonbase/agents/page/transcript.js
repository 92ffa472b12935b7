// The messages of one agent. What an item holds is made when it is opened, and long lists come in portions.

const PORTION = 150;

class Transcript {
  constructor(state, choose, back) {
    Object.assign(this, { state, choose, back, panel: $("panel"), items: [] });
    this.panel.addEventListener("keydown", (event) => this.key(event));
    this.panel.addEventListener("scroll", () => {
      if (this.panel.scrollTop + this.panel.clientHeight * 2 > this.panel.scrollHeight) this.more();
    }, { passive: true });
  }

  show(agent) {
    this.agent = agent;
    this.items = itemsOf(agent);
    this.made = 0;
    this.list = make("div", { class: "items" });
    this.panel.replaceChildren(this.head(agent), this.list);
    this.panel.scrollTop = 0;
    this.more();
  }

  /** The next portion of the items. */
  more(until = this.made + PORTION) {
    const stop = Math.min(this.items.length, until);
    for (; this.made < stop; this.made += 1) this.list.append(this.item(this.items[this.made]));
  }

  /** Open the item of a call and bring it into view. */
  reveal(call) {
    const at = this.items.findIndex((item) => item.call === call || item.tools?.some((tool) => tool.call === call));
    if (at < 0) return;
    this.more(at + 20);
    const item = this.items[at];
    this.open(item, true);
    const tool = item.call === call ? null : item.tools.find((each) => each.call === call);
    if (tool) tool.toggle(true);
    (tool?.element ?? item.element).scrollIntoView({ block: "start" });
  }

  head(agent) {
    const lineage = [];
    for (let each = agent; each; each = this.state.episode.byId.get(each.parent)) lineage.unshift(each);
    const crumbs = lineage.flatMap((each, number) => [number ? make("span", { class: "faint" }, "›") : null,
      each === agent ? make("span", {}, each.id) : make("button", { type: "button", class: "link", onclick: () => this.choose(each, {}) }, each.name)]);
    const answer = agent.text || agent.reason;
    const facts = make("div", { class: "panel-head" },
      make("div", { class: "line" },
        make("button", { type: "button", class: "quiet back", onclick: this.back }, "‹ Agents"),
        make("nav", { class: "crumbs", "aria-label": "Lineage" }, ...crumbs)),
      make("div", { class: "line" }, make("h2", { dir: "auto" }, agent.name), pill(agent.status),
        agent.trainable ? make("span", { class: "chip", title: "its replies may be trained on" }, "trainable") : null),
      make("p", { class: "figures" }, figures(agent)), meters(agent));
    const fold = (title, text, open) => text ? this.section(title, text, open) : null;
    facts.append(...[
      fold("Task", agent.task, agent.task.length < 600),
      fold(agent.text ? "Answer" : "Why it ended", answer, true),
    ].filter(Boolean), make("h3", { class: "between" }, "Messages", make("span", { class: "faint" }, ` ${count(agent.messages.length)}`)));
    return facts;
  }

  section(title, text, open) {
    const body = make("div", { class: "text" });
    const section = make("details", { class: "section", open, ontoggle: () => { if (section.open) fill(); } }, make("summary", {}, title), body);
    const fill = () => { if (!body.firstChild) body.append(...readable(text)); };
    if (open) fill();
    return section;
  }

  item(item) {
    const body = make("div", { class: "body", hidden: true });
    item.button = make("button", { type: "button", class: "head", "aria-expanded": "false", onclick: () => this.open(item) },
      make("span", { class: `tag ${item.role}` }, item.label),
      make("span", { class: `preview${item.call?.wrong ? " bad" : ""}`, dir: "auto" }, item.preview),
      ...item.marks.map(([kind, words]) => make("span", { class: `mark ${kind}` }, words)),
      make("span", { class: "side" }, item.side));
    const { axis, hits, words } = this.state;
    const lit = item.call?.on_critical_path.includes(axis);
    const hit = words && item.text().toLowerCase().includes(words.toLowerCase());
    item.body = body;
    item.element = make("article", { class: `item${lit ? " lit" : ""}${hit ? " hit" : ""}${hits && !hit ? " dim" : ""}` }, item.button, body);
    return item.element;
  }

  open(item, open = item.body.hidden) {
    if (open && !item.body.firstChild) item.body.append(...this.content(item));
    item.body.hidden = !open;
    item.button.setAttribute("aria-expanded", String(open));
    item.element.classList.toggle("open", open);
    highlight(this.state.words);
  }

  content(item) {
    if (!item.call) return [make("div", { class: "text" }, ...readable(textOf(item.message)))];
    const { call, message } = item;
    const nodes = [make("p", { class: "figures" }, callFigures(call))];
    if (call.error) nodes.push(make("p", { class: "trouble" }, `${call.error.kind}: ${call.error.message}`));
    if (message?.reasoning_content) nodes.push(this.section("Reasoning", message.reasoning_content, false));
    if (textOf(message)) nodes.push(make("div", { class: "text" }, ...readable(textOf(message))));
    for (const tool of item.tools) nodes.push(this.tool(tool));
    if (call.budget) nodes.push(make("p", { class: "figures" }, budgetLine(call.budget)));
    return nodes;
  }

  tool(tool) {
    const { call, asked } = tool;
    const body = make("div", { class: "body", hidden: true });
    const children = (call?.children ?? []).map((id) => this.state.episode.byId.get(id)).filter(Boolean);
    const button = make("button", { type: "button", class: "head", "aria-expanded": "false", onclick: () => tool.toggle() },
      make("span", { class: `tag ${children.length ? "delegate" : "tool"}` }, asked.name),
      make("span", { class: "preview", dir: "auto" }, argumentsLine(asked.arguments)),
      call?.error ? make("span", { class: "mark error" }, "error") : null,
      !call ? make("span", { class: "mark" }, "not run") : call.unfinished ? make("span", { class: "mark" }, "unfinished") : null,
      make("span", { class: "side" }, call ? duration(call.end - call.started) : ""));
    tool.toggle = (open = body.hidden) => {
      if (open && !body.firstChild) body.append(...toolContent(tool));
      body.hidden = !open;
      button.setAttribute("aria-expanded", String(open));
      highlight(this.state.words);
    };
    tool.element = make("div", { class: `tool${call?.on_critical_path.includes(this.state.axis) ? " lit" : ""}` }, button,
      children.length ? make("p", { class: "children" }, ...children.map((child) =>
        make("button", { type: "button", class: "chip go", onclick: () => this.choose(child, { open: true }) },
             `${child.name} · ${duration(child.end - child.started)} ›`))) : null, body);
    return tool.element;
  }

  key(event) {
    if (event.target.matches("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const heads = [...this.panel.querySelectorAll("button.head")].filter((button) => button.offsetParent);
    const at = heads.indexOf(document.activeElement);
    const next = heads[at < 0 ? 0 : at + (event.key === "ArrowDown" ? 1 : -1)];
    if (!next) return;
    event.preventDefault();
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
    if (at > heads.length - 10) this.more();
  }
}

/** What a reader meets in order: messages from outside, and steps with their tool calls and results. */
function itemsOf(agent) {
  const replies = new Map();
  const results = new Map();
  const failures = [];
  for (const call of agent.calls) {
    if (call.kind === "tool") {
      if (call.message !== null) results.set(call.message, call);
    } else if (call.message !== null) replies.set(call.message, call);
    else failures.push(call);
  }
  const tools = new Map(agent.calls.filter((call) => call.kind === "tool").map((call) => [call.id, call]));
  const items = [];
  agent.messages.forEach((message, at) => {
    const reply = replies.get(at);
    if (reply) items.push(stepItem(agent, reply, message, tools));
    else if (!results.has(at)) {
      items.push({ role: message.role ?? "?", label: message.role ?? "?", message, call: null, marks: [],
                   preview: oneLine(textOf(message)), side: "", text: () => textOf(message) });
    }
  });
  for (const call of failures) {
    const item = stepItem(agent, call, null, tools);
    const next = items.findIndex((other) => other.call && other.call.step > call.step);
    items.splice(next < 0 ? items.length : next, 0, item);
  }
  return items;
}

function stepItem(agent, call, message, tools) {
  const asked = (message?.tool_calls ?? []).map((one, index) => {
    const found = tools.get(`${agent.id}#${call.step}.${index}`) ?? null;
    return { call: found, asked: { name: one.function?.name ?? "?", arguments: one.function?.arguments ?? "" },
             result: found && found.message !== null ? agent.messages[found.message] : null };
  });
  const names = new Map();
  for (const tool of asked) names.set(tool.asked.name, (names.get(tool.asked.name) ?? 0) + 1);
  const called = [...names].map(([name, number]) => number > 1 ? `${name} ×${number}` : name).join(", ");
  const wrong = asked.filter((tool) => tool.call?.error).length;
  const marks = [];
  if (call.error) marks.push(["error", call.error.kind]);
  if (wrong) marks.push(["error", plural(wrong, "error")]);
  if (call.attempts > 1) marks.push(["retry", `${call.attempts} attempts`]);
  return {
    role: "assistant", label: `step ${call.step}`, call, message, tools: asked, marks,
    preview: call.error ? call.error.message : oneLine(textOf(message)) || called || oneLine(message?.reasoning_content ?? ""),
    side: `${duration(call.end - call.started)} · ${compact(call.usage.input_tokens + call.usage.output_tokens)}`,
    text: () => [textOf(message), message?.reasoning_content ?? "", ...asked.map((tool) =>
      `${tool.asked.name} ${tool.asked.arguments}\n${tool.result ? textOf(tool.result) : ""}`)].join("\n"),
  };
}

function toolContent({ call, asked, result }) {
  return [make("h4", {}, "Arguments"), ...argumentsView(asked.arguments),
          make("h4", { class: call?.error ? "bad" : null }, call?.error ? "Result: an error" : "Result"),
          make("div", { class: `text${call?.error ? " trouble" : ""}` },
               ...(result ? readable(textOf(result)) : [call && !call.unfinished ? "not kept" : "There is none: the episode broke off before."]))];
}

function pill(status) {
  return make("span", { class: `status ${status}` }, status.replace("_", " "));
}

function figures(agent) {
  const own = `${duration(agent.end - agent.started)} · ${plural(agent.spent.steps, "step")} · ${compact(agent.spent.tokens)} tokens · ${dollars(agent.spent.money)}`;
  const below = agent.spent.subagents ? ` · with ${plural(agent.spent.subagents, "sub-agent")}: ${compact(agent.below.tokens)} tokens, ${dollars(agent.below.money)}` : "";
  return own + below + (agent.model ? ` · ${agent.model}` : "");
}

function callFigures(call) {
  const seen = call.sees.reduce((sum, [start, stop]) => sum + stop - start, 0);
  const all = call.sees.length ? call.sees.at(-1)[1] : 0;
  const { input_tokens, output_tokens, cached_tokens } = call.usage;
  return [`${count(input_tokens)} tokens in${cached_tokens ? ` (${count(cached_tokens)} cached)` : ""}, ${count(output_tokens)} out`,
    dollars(call.money), `at ${duration(call.started)}`,
    call.waited ? `${duration(call.waited)} in line` : null, call.model, call.finish_reason,
    call.attempts > 1 ? plural(call.attempts, "attempt") : null,
    seen < all ? `sees ${seen} of ${all} messages: the rest was dropped from the context` : null,
    ...Object.entries(call.sampling).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`),
  ].filter(Boolean).join(" · ");
}

const UNITS = { steps: count, tokens: compact, seconds: duration, money: dollars, critical_steps: count, subagents: count };
const UNIT_NAMES = { steps: "steps", tokens: "tokens", seconds: "time", money: "cost", critical_steps: "critical steps", subagents: "sub-agents" };

function budgetLine(budget) {
  const parts = Object.entries(UNITS).filter(([name]) => budget.spent[name] || budget.limits[name] !== null).map(([name, write]) =>
    `${UNIT_NAMES[name]} ${write(budget.spent[name])}${budget.limits[name] !== null ? ` of ${write(budget.limits[name])}` : ""}`);
  return parts.length ? `Budget after it: ${parts.join(" · ")}` : "";
}

/** What was spent of each limit that there is. */
function meters(agent) {
  const spent = { ...agent.spent };
  if (agent.spent.subagents) Object.assign(spent, { tokens: agent.below.tokens, money: agent.below.money });
  const rows = Object.entries(UNITS).filter(([name]) => agent.limits[name] !== null).map(([name, write]) =>
    meter(UNIT_NAMES[name], spent[name], agent.limits[name], write));
  return rows.length ? make("div", { class: "meters" }, ...rows) : "";
}

function meter(name, spent, limit, write) {
  const share = limit > 0 ? Math.min(1, spent / limit) : 1;
  const bar = make("i", { class: spent > limit ? "over" : share > 0.85 ? "near" : null });
  bar.style.width = `${share * 100}%`;
  return make("div", { class: "meter" }, make("span", {}, name), make("span", { class: "bar", "aria-hidden": "true" }, bar),
              make("span", {}, `${write(spent)} of ${write(limit)}`));
}

/** Mark the words of the search in what is open. */
function highlight(words) {
  if (!window.Highlight || !CSS.highlights) return;
  CSS.highlights.clear();
  if (!words) return;
  const wanted = words.toLowerCase();
  const ranges = [];
  const walker = document.createTreeWalker($("panel"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node && ranges.length < 2000; node = walker.nextNode()) {
    const text = node.data.toLowerCase();
    if (text.length !== node.data.length) continue;
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
      const range = new Range();
      range.setStart(node, at);
      range.setEnd(node, at + wanted.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}
