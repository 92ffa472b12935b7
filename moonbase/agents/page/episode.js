// An episode in memory: the tree, what each node costs, and where everything lies on each of the three axes.

/** Read one of the embedded episodes. */
function readEpisode(number) {
  const episode = JSON.parse($(`episode-${number}`).textContent);
  const byId = new Map(episode.agents.map((agent) => [agent.id, agent]));
  const callOf = new Map();
  episode.byId = byId;
  episode.callOf = callOf;
  for (const agent of episode.agents) Object.assign(agent, { children: [], depth: 0, tools: agent.tools ?? [] });
  for (const agent of episode.agents) {
    const parent = byId.get(agent.parent);
    if (parent) {
      parent.children.push(agent);
      agent.depth = parent.depth + 1;
    }
    agent.end = agent.ended ?? episode.seconds;
    describe(agent, episode, callOf);
  }
  // What is below a node counts as part of it.
  for (const agent of [...episode.agents].reverse()) {
    agent.below = { tokens: agent.spent.tokens, money: agent.spent.money, steps: agent.spent.steps };
    agent.troublesBelow = agent.errors.length;
    for (const child of agent.children) {
      for (const name of Object.keys(agent.below)) agent.below[name] += child.below[name];
      agent.troublesBelow += child.troublesBelow;
    }
  }
  episode.roots = episode.agents.filter((agent) => !byId.has(agent.parent));
  episode.busy = 0;
  for (const agent of episode.agents) {
    for (const call of agent.calls) if (!call.children?.length) episode.busy += call.end - call.started;
  }
  episode.retries = episode.agents.reduce((sum, agent) => sum + agent.retries, 0);
  episode.errors = episode.agents.reduce((sum, agent) => sum + agent.errors.length, 0);
  episode.toolCalls = episode.agents.reduce((sum, agent) => sum + agent.calls.filter((call) => call.kind === "tool").length, 0);
  episode.length = { seconds: episode.seconds };
  layOut(episode, "steps", () => 1);
  layOut(episode, "tokens", (call) => call.usage.input_tokens + call.usage.output_tokens);
  return episode;
}

/** What an agent's calls say together. */
function describe(agent, episode, callOf) {
  agent.errors = [];
  agent.retries = 0;
  agent.lit = { seconds: false, steps: false, tokens: false };
  for (const call of agent.calls) {
    call.agent = agent;
    call.end = call.ended ?? episode.seconds;
    call.wrong = call.kind === "model" ? call.error !== null : call.error;
    call.unfinished = call.kind === "tool" && call.ended === null;
    callOf.set(call.id, call);
    if (call.wrong) agent.errors.push(call);
    if (call.attempts > 1) agent.retries += call.attempts - 1;
    for (const measure of call.on_critical_path) agent.lit[measure] = true;
    call.at = { seconds: [call.started, call.end] };
  }
  agent.at = { seconds: [agent.started, agent.end] };
  agent.bad = !["finished", "unfinished"].includes(agent.status);
}

/** Places on an axis of work: model calls have a width, tool calls that of the longest sub-agent below them. */
function layOut(episode, axis, width) {
  const place = (agent, from) => {
    const tools = new Map();
    for (const call of agent.calls) if (call.kind === "tool") tools.set(call.step, [...(tools.get(call.step) ?? []), call]);
    const models = agent.calls.filter((call) => call.kind === "model");
    let at = from;
    models.forEach((call, number) => {
      call.at[axis] = [at, at += width(call)];
      if (models[number + 1]?.step === call.step) return;
      let end = at;
      for (const tool of tools.get(call.step) ?? []) {
        const ends = tool.children.map((id) => episode.byId.get(id)).filter(Boolean).map((child) => place(child, at));
        tool.at[axis] = [at, Math.max(at, ...ends)];
        end = Math.max(end, tool.at[axis][1]);
      }
      at = end;
    });
    for (const call of agent.calls) call.at[axis] ??= [at, at];
    agent.at[axis] = [from, at];
    return at;
  };
  episode.length[axis] = Math.max(0, ...episode.roots.map((root) => place(root, 0)));
  for (const agent of episode.agents) {
    agent.at[axis] ??= [0, 0];
    for (const call of agent.calls) call.at[axis] ??= [0, 0];
  }
}

/** The agents to show, parents before children. */
function visibleRows(episode, { folded, role, errors, lit, axis, hits }) {
  const fits = (agent) => (!role || agent.name === role) && (!errors || agent.errors.length > 0 || agent.bad)
    && (!lit || agent.lit[axis]) && (!hits || hits.has(agent.id));
  const filtered = Boolean(role || errors || lit || hits);
  const rows = [];
  const waiting = [...episode.roots].reverse();
  while (waiting.length) {
    const agent = waiting.pop();
    if (!filtered || fits(agent)) rows.push(agent);
    // A filter looks into folded branches as well.
    if (filtered || !folded.has(agent.id)) waiting.push(...[...agent.children].reverse());
  }
  return rows;
}

/** Agent id -> how many of its messages contain the words. */
function searchEpisode(episode, words) {
  const wanted = words.toLowerCase();
  const hits = new Map();
  for (const agent of episode.agents) {
    agent.searched ??= agent.messages.map((message) => [textOf(message), message.reasoning_content ?? "",
      ...(message.tool_calls ?? []).map((call) => `${call.function?.name} ${call.function?.arguments}`)].join("\n").toLowerCase());
    const found = agent.searched.reduce((sum, text) => sum + text.includes(wanted), 0)
      + [agent.id, agent.name, agent.reason].some((text) => text.toLowerCase().includes(wanted));
    if (found) hits.set(agent.id, found);
  }
  return hits;
}
