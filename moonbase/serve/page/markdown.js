// A small, safe markdown: what a model writes becomes elements of a fixed list and text nodes, never markup.
//
// Known: fenced code, headings, lists, quotes, tables, rules, paragraphs; `code`, **bold**, *italic*. Links and images
// stay the text that they are: a reply can neither load anything nor hide where a link leads.
// Every step is linear in the length of the text, and a block that did not change keeps its element.

import { copyButton, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\|?(\s*:?-+:?\s*\|)*\s*:?-*:?$/;
const MAX_DEPTH = 6;

/** Shows a growing text inside `container`. */
export class Markdown {
  constructor(container) {
    this.container = container;
    this.shown = [];
  }

  /** Make the container show `text`; only what changed is built anew. */
  update(text) {
    const found = blocks(text);
    found.forEach((block, number) => {
      const old = this.shown[number];
      const alike = old && old.kind === block.kind && old.language === block.language;
      if (alike && old.source === block.source) {
        block.node = old.node;
      } else if (alike && block.kind === "code") {
        // The same element, so that a copy button and a scrolled line stay where they are.
        block.node = old.node;
        block.node.querySelector("code").textContent = block.source;
      } else {
        block.node = build(block);
        if (old) old.node.replaceWith(block.node);
        else this.container.append(block.node);
      }
    });
    for (const old of this.shown.slice(found.length)) old.node.remove();
    this.shown = found;
  }
}

/** Cut a text into blocks: {kind, source, ...}. */
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) {
      const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      let end = at + 1;
      while (end < lines.length && !closing.test(lines[end])) end += 1;
      found.push({ kind: "code", language: fence[2], source: lines.slice(at + 1, end).join("\n") });
      at = end + 1;
      continue;
    }
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at);
    let end = at + 1;
    while (end < lines.length && goesOn(kind, lines, end)) end += 1;
    found.push({ kind, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return found;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (ITEM.test(line)) return "list";
  if (QUOTE.test(line)) return "quote";
  const next = lines[at + 1]?.trim() ?? "";
  if (line.includes("|") && next.includes("|") && next.includes("-") && DIVIDER.test(next)) return "table";
  return "paragraph";
}

/** Whether line `at` still belongs to a block of this kind. */
function goesOn(kind, lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return false;
  if (kind === "list") {
    if (line.trim()) return ITEM.test(line) || /^\s{2,}/.test(line);
    // One empty line between two items does not end the list.
    return at + 1 < lines.length && (ITEM.test(lines[at + 1]) || /^\s{2,}\S/.test(lines[at + 1]));
  }
  if (!line.trim()) return false;
  if (kind === "quote") return QUOTE.test(line);
  if (kind === "table") return line.includes("|");
  return kind === "paragraph" && kindOf(lines, at) === "paragraph";
}

function build(block, depth = 0) {
  if (block.kind === "code") return codeBlock(block);
  if (block.kind === "rule") return make("hr");
  if (block.kind === "heading") {
    const [, signs, title] = HEADING.exec(block.source);
    // The page's own headings are h1 and h2.
    return make(`h${Math.min(signs.length + 2, 6)}`, { dir: "auto" }, ...inline(title));
  }
  if (block.kind === "list") return list(block.source.split("\n"));
  if (block.kind === "table") return table(block.source.split("\n"));
  if (block.kind === "quote") {
    const inner = block.source.split("\n").map((line) => QUOTE.exec(line)[1]).join("\n");
    const parts = depth < MAX_DEPTH ? blocks(inner).map((part) => build(part, depth + 1)) : [inner];
    return make("blockquote", { dir: "auto" }, ...parts);
  }
  return make("p", { dir: "auto" }, ...inline(block.source));
}

function codeBlock({ language, source }) {
  const code = make("code", {}, source);
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"),
                    copyButton(() => code.textContent));
  return make("div", { class: "code" }, head, make("pre", { tabindex: "0", dir: "ltr" }, code));
}

/** Lines to nested lists, by indentation. */
function list(lines) {
  const open = [];
  let root = null;
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) {
      if (line.trim()) open.at(-1).item.append(make("br"), ...inline(line.trim()));
      continue;
    }
    const indent = match[1].replace(/\t/g, "    ").length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (!open.length || (indent >= open.at(-1).indent + 2 && open.length < MAX_DEPTH)) {
      const element = match[2] ? make("ul") : make("ol", { start: match[3] });
      if (open.length) open.at(-1).item.append(element);
      else root = element;
      open.push({ indent, element, item: null });
    }
    const item = make("li", { dir: "auto" }, ...inline(match[4]));
    open.at(-1).element.append(item);
    open.at(-1).item = item;
  }
  return root;
}

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  const row = (tag, values) => make("tr", {}, ...values.map((value) => make(tag, { dir: "auto" }, ...inline(value))));
  return make("div", { class: "table", tabindex: "0" },
              make("table", {}, make("thead", {}, row("th", head)),
                   make("tbody", {}, ...rows.map((values) => row("td", values)))));
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

/** Text with `code`, **bold** and *italic* to nodes. Markers without a partner stay text. */
export function inline(text, depth = 0) {
  const nodes = [];
  const hopeless = new Set();  // markers that have no partner further on: looked for once only
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const character = text[at];
    if (character === "\\" && /[\\`*_#|~-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (character !== "`" && character !== "*" && character !== "_") {
      plain += character;
      at += 1;
      continue;
    }
    const marker = character === "`" ? /^`+/.exec(text.slice(at, at + 64))[0]
      : text[at + 1] === character ? character + character : character;
    const end = hopeless.has(marker) || !opens(text, at, marker) ? -1 : closing(text, at + marker.length, marker);
    if (end < 0) {
      if (!hopeless.has(marker) && opens(text, at, marker)) hopeless.add(marker);
      plain += marker;
      at += marker.length;
      continue;
    }
    const inner = text.slice(at + marker.length, end);
    if (character === "`") push(make("code", {}, inner.replace(/^ (.+) $/s, "$1")));
    else push(make(marker.length === 2 ? "strong" : "em", {}, ...(depth < MAX_DEPTH ? inline(inner, depth + 1) : [inner])));
    at = end + marker.length;
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function opens(text, at, marker) {
  if (marker[0] === "`") return true;
  const after = text[at + marker.length] ?? " ";
  return !/\s/.test(after) && (marker[0] === "*" || !/[\p{L}\p{N}]/u.test(text[at - 1] ?? " "));
}

/** Where the partner of a marker begins, or -1. Whether a place closes depends on its neighbours alone. */
function closing(text, from, marker) {
  for (let at = text.indexOf(marker, from); at >= 0; at = text.indexOf(marker, at + 1)) {
    const after = text[at + marker.length] ?? " ";
    if (marker[0] === "`") {
      if (after !== "`" && text[at - 1] !== "`") return at;
    } else if (at > from && !/\s/.test(text[at - 1]) && !(marker.length === 1 && (after === marker || text[at - 1] === marker))
               && (marker[0] === "*" || !/[\p{L}\p{N}]/u.test(after))) {
      return at;
    }
  }
  return -1;
}
