// Small helpers for building the page. Text always becomes a text node: nothing here reads markup.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  done: "M5 12.5l4.5 4.5L19 7",
  edit: "M4 20l1-4.5L16 4.5l3.5 3.5L8.5 19zM13.5 7l3.5 3.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19.5 3.5v4h-4",
};

/** An element with attributes and children; strings become text nodes, null and false nothing. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A quiet button with an icon and a word. */
export function iconButton(name, label, onclick, attributes = {}) {
  return make("button", { type: "button", class: "quiet", onclick, ...attributes }, icon(name), make("span", {}, label));
}

/** A button that copies what `text()` returns and says that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "done" : "copy"), make("span", {}, copied ? "Copied" : "Not allowed"));
    setTimeout(() => button.replaceChildren(icon("copy"), make("span", {}, label)), 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A page that came over plain http from another machine has no clipboard; the old command still works there.
    const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    before?.focus();
    return copied;
  }
}
