// A small markdown: fenced code, headings, lists, quotes, tables, rules, paragraphs; `code`, **bold**, *italic*.
// Links and images stay the text that they are, so that a trace can neither load anything nor lead anywhere.

const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const BREAKS = /^\s*(```|~~~|#{1,6}\s|>|([-*_])(\s*\2){2,}\s*$|[-*+]\s|\d{1,9}[.)]\s)/;

/** The elements of a text. Every line is looked at once. */
function markdown(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = /^\s*(```+|~~~+)\s*(\S*)/.exec(line);
    const heading = /^\s*(#{1,6})\s+(.*)$/.exec(line);
    let end = at + 1;
    if (!line.trim()) {
      at += 1;
      continue;
    }
    if (fence) {
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      nodes.push(make("pre", { tabindex: "0", dir: "ltr" }, make("code", {}, lines.slice(at + 1, end).join("\n"))));
      end += 1;
    } else if (heading) {
      nodes.push(make(`h${Math.min(heading[1].length + 3, 6)}`, { dir: "auto" }, ...inline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      nodes.push(make("hr"));
    } else if (line.includes("|") && DIVIDER.test(lines[end] ?? "") && lines[end].includes("-")) {
      while (end < lines.length && lines[end].includes("|")) end += 1;
      const rows = [line, ...lines.slice(at + 2, end)].map(cells);
      nodes.push(tableOf(rows[0], rows.slice(1), inline));
    } else if (ITEM.test(line)) {
      while (end < lines.length && (ITEM.test(lines[end]) || /^\s{2,}\S/.test(lines[end]))) end += 1;
      nodes.push(listOf(lines.slice(at, end)));
    } else if (/^\s*>/.test(line)) {
      while (end < lines.length && /^\s*>/.test(lines[end])) end += 1;
      const quoted = lines.slice(at, end).map((each) => each.replace(/^\s*> ?/, "")).join("\n");
      nodes.push(make("blockquote", { dir: "auto" }, ...inline(quoted)));
    } else {
      while (end < lines.length && lines[end].trim() && !BREAKS.test(lines[end])
             && !(lines[end].includes("|") && DIVIDER.test(lines[end + 1] ?? ""))) end += 1;
      nodes.push(make("p", { dir: "auto" }, ...inline(lines.slice(at, end).join("\n"))));
    }
    at = end;
  }
  return nodes;
}

const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

/** A table; columns of numbers only stand to the right. */
function tableOf(head, rows, render = (text) => [text]) {
  const numeric = head.map((_, column) => rows.length > 0 && rows.every((row) => /^[-+−$€£]?[\d.,\s%]*$/.test(row[column] ?? "")));
  const line = (tag, values) => make("tr", {}, ...head.map((_, column) =>
    make(tag, { dir: "auto", class: numeric[column] ? "number" : null }, ...render(values[column] ?? ""))));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
              make("table", {}, make("thead", {}, line("th", head)), make("tbody", {}, ...rows.map((row) => line("td", row)))));
}

function listOf(lines) {
  const open = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) {
      open.at(-1).item.append(" ", ...inline(line.trim()));
      continue;
    }
    const indent = match[1].length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (!open.length || (indent >= open.at(-1).indent + 2 && open.length < 6)) {
      const list = match[2] === undefined ? make("ul") : make("ol", { start: match[2] });
      if (open.length) open.at(-1).item.append(list);
      open.push({ indent, list, item: null });
    }
    const item = make("li", { dir: "auto" }, ...inline(match[3]));
    open.at(-1).list.append(item);
    open.at(-1).item = item;
  }
  return open[0].list;
}

/** Text with its `code`, **bold** and *italic* as elements. */
function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])/g)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(match[1] !== undefined ? make("code", {}, match[1]) : match[2] !== undefined ? make("strong", {}, match[2])
      : make("em", {}, match[3]));
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}
