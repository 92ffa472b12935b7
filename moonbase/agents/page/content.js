// What a message holds, made readable: JSON indented or as a table, markdown, long texts cut with the rest at a click.

const MOST = 20000;

/** Elements for a text of unknown kind. */
function readable(text) {
  const trimmed = text.trim();
  if (trimmed.length < 2e6 && /^[[{]/.test(trimmed)) {
    try {
      return jsonView(JSON.parse(trimmed));
    } catch {
      // Not JSON after all.
    }
  }
  return cutted(text, markdown);
}

/** At most MOST characters at once. */
function cutted(text, render) {
  if (text.length <= MOST) return render(text);
  const end = text.lastIndexOf("\n", MOST) > MOST / 2 ? text.lastIndexOf("\n", MOST) : MOST;
  const button = make("button", { type: "button", class: "plain", onclick: () => button.replaceWith(...cutted(text.slice(end), render)) },
                      `Show more: ${count(text.length - end)} characters are left`);
  return [...render(text.slice(0, end)), button];
}

/** A list of like objects is a table; anything else is indented. */
function jsonView(value) {
  const flat = (item) => item === null || typeof item !== "object";
  if (Array.isArray(value) && value.length > 1 && value.length <= 500 && value.every((item) => !flat(item) && !Array.isArray(item)
      && Object.values(item).every(flat))) {
    const head = [...new Set(value.flatMap((item) => Object.keys(item)))];
    if (head.length && head.length <= 12) {
      return [tableOf(head, value.map((item) => head.map((name) => item[name] === undefined || item[name] === null ? "" : String(item[name]))))];
    }
  }
  return cutted(JSON.stringify(value, null, 2) ?? "null", (text) => [make("pre", { tabindex: "0", dir: "ltr" }, ...coloured(text))]);
}

/** JSON text with names and values told apart. */
function coloured(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(/("(?:[^"\\]|\\.)*")(\s*:)?|\b(?:true|false|null)\b|-?\b\d[\d.eE+-]*/g)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(make("span", { class: match[2] ? "j-name" : match[1] ? "j-text" : "j-value" }, match[1] ?? match[0]));
    if (match[2]) nodes.push(match[2]);
    from = match.index + match[0].length;
  }
  nodes.push(text.slice(from));
  return nodes;
}

/** Arguments of a tool call: names and values, where they are an object. */
function argumentsView(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return [make("p", { class: "trouble" }, "These arguments are not JSON."), make("pre", { tabindex: "0" }, text)];
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) return jsonView(value);
  const rows = Object.entries(value).map(([name, item]) => make("div", {}, make("dt", {}, name),
    make("dd", { dir: "auto" }, ...(typeof item === "string" ? cutted(item, (part) => [make("span", {}, part)])
      : item !== null && typeof item === "object" ? jsonView(item) : [String(item)]))));
  return [rows.length ? make("dl", { class: "arguments" }, ...rows) : make("p", { class: "faint" }, "no arguments")];
}

/** The text of a message's content, which may come in parts. */
function textOf(message) {
  const content = message?.content;
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return content ? JSON.stringify(content) : "";
  return content.map((part) => part?.text ?? `[${part?.type ?? "part"}]`).join("\n");
}

/** The first line of a call's arguments, as a reader would say it. */
function argumentsLine(text) {
  try {
    const value = JSON.parse(text);
    if (value && typeof value === "object") {
      return oneLine(Object.values(value).map((item) => typeof item === "string" ? item : JSON.stringify(item)).join(", "), 160);
    }
  } catch {
    // As it is, then.
  }
  return oneLine(text, 160);
}
