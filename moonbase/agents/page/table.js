// The chart in words: a table of the agents with what each cost. It is made when it is asked for, and for print.

const COLUMNS = [
  ["Agent", (agent) => agent.name, (agent) => agent.name],
  ["Id", (agent) => agent.id, (agent) => agent.id],
  ["Status", (agent) => agent.status, (agent) => agent.status.replace("_", " ")],
  ["Start", (agent) => agent.started, (agent) => duration(agent.started)],
  ["Time", (agent) => agent.end - agent.started, (agent) => duration(agent.end - agent.started)],
  ["Steps", (agent) => agent.spent.steps, (agent) => count(agent.spent.steps)],
  ["Tokens", (agent) => agent.spent.tokens, (agent) => count(agent.spent.tokens)],
  ["Cost", (agent) => agent.spent.money, (agent) => dollars(agent.spent.money)],
  ["Total cost", (agent) => agent.below.money, (agent) => dollars(agent.below.money)],
  ["Errors", (agent) => agent.errors.length, (agent) => count(agent.errors.length)],
  ["Retries", (agent) => agent.retries, (agent) => count(agent.retries)],
  ["Critical path", (agent) => Object.values(agent.lit).filter(Boolean).length,
   (agent) => Object.keys(agent.lit).filter((measure) => agent.lit[measure]).join(", ") || "no"],
];

/** The table of some agents; `sorted`: [column, direction], or null for the order of the tree. */
function agentTable(rows, choose, sorted, sort) {
  const order = sorted ? [...rows].sort((one, other) => {
    const [a, b] = [one, other].map(COLUMNS[sorted[0]][1]);
    return sorted[1] * (a < b ? -1 : a > b ? 1 : 0);
  }) : rows;
  const heads = COLUMNS.map(([title], column) => make("th", {
    scope: "col", class: column >= 3 && column <= 10 ? "number" : null,
    "aria-sort": sorted?.[0] === column ? (sorted[1] > 0 ? "ascending" : "descending") : null,
  }, make("button", { type: "button", class: "link", onclick: () => sort(column) }, title)));
  const body = order.map((agent) => make("tr", { class: agent.lit.seconds ? "lit" : null }, ...COLUMNS.map(([, , write], column) => {
    if (column) return make("td", { class: column >= 3 && column <= 10 ? "number" : column === 1 ? "id" : null }, write(agent));
    const cell = make("th", { scope: "row" }, make("button", { type: "button", class: "link", dir: "auto", onclick: () => choose(agent, { open: true }) }, agent.name));
    cell.style.paddingLeft = sorted ? "" : `${10 + Math.min(8, agent.depth) * 14}px`;
    return cell;
  })));
  return make("table", {}, make("caption", { class: "unseen" }, "Agents: when they ran and what they cost"),
              make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}
