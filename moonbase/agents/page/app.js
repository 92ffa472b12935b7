// The page: one state, what changes it, and what is shown of it.

const summaries = JSON.parse($("episodes").textContent);
const state = { number: 0, episode: null, agent: null, call: null, axis: "seconds", view: "chart", folded: new Set(),
                role: "", errors: false, lit: false, words: "", hits: null, sorted: null };
const chart = new Chart(state, choose);
const transcript = new Transcript(state, choose, toAgents);

function openEpisode(number) {
  if (number < 0 || number >= summaries.length) return;
  state.number = number;
  state.episode = readEpisode(number);
  Object.assign(state, { agent: state.episode.roots[0] ?? null, call: null, folded: new Set(), role: "", words: "", hits: null });
  $("search").value = "";
  $("episode").value = String(number);
  $("previous").disabled = number === 0;
  $("next").disabled = number === summaries.length - 1;
  document.title = `${oneLine(state.episode.task, 60) || state.episode.id} · moonbase trace`;
  const task = $("task");
  task.textContent = oneLine(state.episode.task, 400) || state.episode.id;
  $("status").replaceWith(Object.assign(pill(state.episode.status), { id: "status" }));
  $("tiles").replaceChildren(...tiles(state.episode));
  const names = new Map();
  for (const agent of state.episode.agents) names.set(agent.name, (names.get(agent.name) ?? 0) + 1);
  $("role").replaceChildren(make("option", { value: "" }, "All agents"), ...[...names].slice(0, 500).map(([name, many]) =>
    make("option", { value: name }, `${oneLine(name, 40)}${many > 1 ? ` (${count(many)})` : ""}`)));
  document.body.classList.remove("reading");
  update({ fit: true });
  if (state.agent) transcript.show(state.agent);
  else $("panel").replaceChildren(make("p", { class: "nothing" }, "No agent was started."));
  searchSays();
}

/** Draw what the state asks for. */
function update({ fit = false } = {}) {
  const { episode, axis } = state;
  const rows = visibleRows(episode, state);
  $("left").classList.toggle("as-table", state.view === "table");
  $("gantt").hidden = state.view === "table";
  $("table").hidden = state.view !== "table";
  for (const element of document.querySelectorAll(".on-chart")) element.hidden = state.view === "table";
  $("gist").textContent = gist(episode, axis);
  if (state.view === "table") {
    $("table").replaceChildren(agentTable(rows, choose, state.sorted, sortBy));
  }
  chart.show(rows, { fit });
}

function gist(episode, axis) {
  const lit = episode.agents.filter((agent) => agent.lit[axis]).length;
  const total = { seconds: episode.critical.seconds, steps: episode.critical.steps, tokens: episode.critical.tokens }[axis];
  const whole = { seconds: episode.busy, steps: episode.spent.steps, tokens: episode.spent.tokens }[axis];
  if (episode.agents.length < 2) return `One agent: ${amount(axis, total)}.`;
  return `Critical path: ${amount(axis, total)} through ${plural(lit, "agent")}. All together: ${amount(axis, whole)}`
    + `${axis === "seconds" ? " of work" : ""}${total > 0 ? `, ${(whole / total).toFixed(1)}× as much` : ""}.`;
}

function sortBy(column) {
  state.sorted = state.sorted?.[0] === column ? (state.sorted[1] < 0 ? [column, 1] : null) : [column, column < 3 ? 1 : -1];
  update();
}

/** Choose an agent, perhaps one of its calls; `open`: show the messages where there is room for one thing only. */
function choose(agent, { call = null, open = false, fold = false, keep = false } = {}) {
  if (fold) {
    if (!state.folded.delete(agent.id)) state.folded.add(agent.id);
    update();
    return;
  }
  const other = state.agent !== agent;
  state.agent = agent;
  state.call = call;
  for (let above = state.episode.byId.get(agent.parent); above; above = state.episode.byId.get(above.parent)) {
    if (state.folded.delete(above.id)) update();
  }
  if (open) document.body.classList.add("reading");
  if (other) transcript.show(agent);
  if (call) transcript.reveal(call);
  if (!keep) chart.reveal(agent);
  else chart.draw();
  highlight(state.words);
}

function toAgents() {
  document.body.classList.remove("reading");
  $("scroller").focus({ preventScroll: true });
}

function tiles(episode) {
  const { spent, limits, critical } = episode;
  const tile = (name, value, note, limit, used, write) => {
    const cell = make("div", {}, make("dt", {}, name), make("dd", {}, make("strong", {}, value), note ? make("span", {}, note) : null));
    if (limit !== null && limit !== undefined) {
      cell.lastChild.append(make("span", {}, `of ${write(limit)}`), make("span", { class: "bar", "aria-hidden": "true" }, make("i", { class: used > limit ? "over" : used > 0.85 * limit ? "near" : null })));
      cell.lastChild.lastChild.firstChild.style.width = `${Math.min(100, (100 * used) / (limit || 1))}%`;
    }
    return cell;
  };
  const side = critical.seconds > 0 ? episode.busy / critical.seconds : 0;
  const found = [
    tile("Time", duration(spent.seconds), null, limits.seconds, spent.seconds, duration),
    tile("Parallelism", `${side.toFixed(1)}×`, "work ÷ time"),
    tile("Critical steps", count(critical.steps), null, limits.critical_steps, critical.steps, count),
    tile("Steps", count(spent.steps), `${plural(episode.toolCalls, "tool call")}`),
    tile("Tokens", compact(spent.tokens), null, limits.tokens, spent.tokens, compact),
    tile("Cost", dollars(spent.money), null, limits.money, spent.money, dollars),
    tile("Sub-agents", count(spent.subagents), null, limits.subagents, spent.subagents, count),
    tile("Errors", count(episode.errors), `${count(episode.retries)} ${episode.retries === 1 ? "retry" : "retries"}`),
  ];
  for (const [name, value] of Object.entries(episode.rewards).slice(0, 4)) {
    found.push(tile(name.replaceAll("_", " "), value.toFixed(3).replace(/\.?0+$/, "") || "0", "reward"));
  }
  return found;
}

function search() {
  const words = $("search").value.trim();
  state.words = words.length > 1 ? words : "";
  state.hits = state.words ? searchEpisode(state.episode, state.words) : null;
  update();
  const first = state.hits && !state.hits.has(state.agent?.id) ? chart.rows[0] : state.agent;
  if (first) {
    state.agent = first;
    transcript.show(first);
    chart.reveal(first);
  }
  searchSays();
  highlight(state.words);
}

function searchSays() {
  const total = state.hits ? [...state.hits.values()].reduce((sum, each) => sum + each, 0) : 0;
  $("found").textContent = !state.hits ? "" : total ? `${count(total)} in ${plural(state.hits.size, "agent")}` : "nothing";
}

/** Enter in the search: the next message that has the words, in this agent or the next. */
function nextHit() {
  if (!state.hits?.size) return;
  const open = transcript.items.findLastIndex((item) => item.visited);
  const next = transcript.items.findIndex((item, at) => at > open && item.text().toLowerCase().includes(state.words.toLowerCase()));
  if (next < 0) {
    const rows = chart.rows;
    choose(rows[(rows.indexOf(state.agent) + 1) % rows.length], { open: true });
    for (const item of transcript.items) item.visited = false;
    if (rows.length === 1) transcript.show(state.agent);
    return;
  }
  transcript.more(next + 20);
  const item = transcript.items[next];
  item.visited = true;
  transcript.open(item, true);
  const wanted = state.words.toLowerCase();
  for (const tool of item.tools ?? []) {
    if (`${tool.asked.arguments}\n${tool.result ? textOf(tool.result) : ""}`.toLowerCase().includes(wanted)) tool.toggle(true);
  }
  document.body.classList.add("reading");
  item.element.scrollIntoView({ block: "start" });
  highlight(state.words);
}

function moveTo(step) {
  const rows = chart.rows;
  if (!rows.length) return;
  const at = rows.indexOf(state.agent);
  choose(rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + step))]);
}

const TREE_KEYS = {
  ArrowDown: () => moveTo(1), ArrowUp: () => moveTo(-1), PageDown: () => moveTo(12), PageUp: () => moveTo(-12),
  Home: () => moveTo(-1e9), End: () => moveTo(1e9),
  ArrowLeft: () => {
    const { agent, folded, episode } = state;
    if (agent?.children.length && !folded.has(agent.id)) choose(agent, { fold: true });
    else if (episode.byId.has(agent?.parent)) choose(episode.byId.get(agent.parent));
  },
  ArrowRight: () => {
    if (state.folded.has(state.agent?.id)) choose(state.agent, { fold: true });
    else if (state.agent?.children.length) choose(state.agent.children[0]);
  },
  Enter: () => {
    document.body.classList.add("reading");
    const head = $("panel").querySelector(".items button.head");
    (head ?? $("panel")).focus();
  },
};

const PAGE_KEYS = {
  "/": () => { $("search").focus(); $("search").select(); },
  "+": () => chart.zoom(1.6), "=": () => chart.zoom(1.6), "-": () => chart.zoom(1 / 1.6), "0": () => { chart.range = [0, chart.total()]; chart.draw(); },
  "1": () => setAxis("seconds"), "2": () => setAxis("steps"), "3": () => setAxis("tokens"),
  "[": () => openEpisode(state.number - 1), "]": () => openEpisode(state.number + 1),
};

function setAxis(axis) {
  state.axis = axis;
  document.querySelector(`[name=axis][value=${axis}]`).checked = true;
  update({ fit: true });
  if (state.agent) transcript.show(state.agent);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    $("tip").hidden = true;
    if (!$("keys").hidden) showKeys(false);
    else if (event.target === $("search") || (state.words && !$("panel").contains(document.activeElement))) {
      $("search").value = "";
      search();
      toAgents();
    } else toAgents();
    return;
  }
  if (event.target === $("search") && event.key === "Enter") return nextHit();
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const work = (event.target === $("scroller") || event.target === document.body ? TREE_KEYS[event.key] : null) ?? PAGE_KEYS[event.key];
  if (work) {
    event.preventDefault();
    work();
  }
}

function showKeys(open) {
  $("keys").hidden = !open;
  $("help").setAttribute("aria-expanded", String(open));
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  themeSays();
  chart.draw();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const themeSays = () => { $("theme").textContent = isDark() ? "Light" : "Dark"; };

/** On paper everything must stand there: all rows, the table, and the messages of the agent that is open. */
function forPrint(printing) {
  chart.all = printing && chart.rows.length <= 600;
  $("gantt").classList.toggle("whole", chart.all);
  if (printing) {
    transcript.more(Math.min(transcript.items.length, 400));
    $("table").replaceChildren(agentTable(chart.rows.slice(0, 2000), choose, state.sorted, sortBy));
  }
  chart.drawNow();
}

summaries.forEach((summary, number) => $("episode").append(make("option", { value: number },
  `${number + 1} of ${summaries.length}: ${oneLine(summary.task, 60) || summary.id} (${summary.status.replace("_", " ")})`)));
$("picker").hidden = summaries.length < 2;
$("episode").addEventListener("change", () => openEpisode(Number($("episode").value)));
$("previous").addEventListener("click", () => openEpisode(state.number - 1));
$("next").addEventListener("click", () => openEpisode(state.number + 1));
$("closer").addEventListener("click", PAGE_KEYS["+"]);
$("wider").addEventListener("click", PAGE_KEYS["-"]);
$("fit").addEventListener("click", PAGE_KEYS["0"]);
$("help").addEventListener("click", () => showKeys($("keys").hidden));
$("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
$("role").addEventListener("change", () => { state.role = $("role").value; update(); });
$("task").addEventListener("click", () => $("task").classList.toggle("whole"));
for (const name of ["errors", "lit"]) $(name).addEventListener("change", () => { state[name] = $(name).checked; update(); });
for (const input of document.querySelectorAll("[name=axis]")) input.addEventListener("change", () => setAxis(input.value));
for (const input of document.querySelectorAll("[name=view]")) input.addEventListener("change", () => { state.view = input.value; update(); });
let typing = 0;
$("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 120); });
document.addEventListener("keydown", onKey);
dark.addEventListener("change", () => { themeSays(); chart.draw(); });
addEventListener("beforeprint", () => forPrint(true));
addEventListener("afterprint", () => forPrint(false));
themeSays();
openEpisode(0);
document.body.dataset.ready = "yes";
