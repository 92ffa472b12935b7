// The settings panel: what is sent beside the messages. An empty field is not sent; the server's default holds then.

import { demoTools, readTools } from "./tools.js";

const STORED = "moonbase.settings";
const NUMBERS = { temperature: [0, 2], top_p: [0, 1], max_tokens: [1, 1e6, "whole"], seed: [0, 2 ** 53 - 1, "whole"] };
const LABELS = { temperature: "Temperature", top_p: "Top p", max_tokens: "Max tokens", seed: "Seed" };

export class Settings {
  /** `form`: the panel's form; its fields carry the names of the request's. */
  constructor(form) {
    this.form = form;
    this.load();
    form.addEventListener("input", () => {
      this.check();
      this.save();
    });
    form.addEventListener("reset", () => setTimeout(() => {
      this.check();
      this.save();
    }));
    form.addEventListener("submit", (event) => event.preventDefault());
    this.check();
  }

  get(name) {
    const field = this.form.elements[name];
    return field.type === "checkbox" ? field.checked : field.value;
  }

  set(name, value) {
    const field = this.form.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
    this.check();
    this.save();
  }

  /** Say beside each field what is wrong with it. Returns the first field that is wrong, or null. */
  check() {
    let first = null;
    for (const field of this.fields()) {
      const problem = this.problem(field);
      const line = document.getElementById(`${field.name}-error`);
      if (line) line.textContent = problem;
      field.setAttribute("aria-invalid", problem ? "true" : "false");
      if (problem) first ??= field;
    }
    return first;
  }

  fields() {
    return [...this.form.elements].filter((element) => element.name);
  }

  problem(field) {
    if (field.name === "tools") return readTools(field.value).error ?? "";
    if (!(field.name in NUMBERS)) return "";
    const [low, high, whole] = NUMBERS[field.name];
    if (field.validity.badInput) return `${LABELS[field.name]} must be a number.`;
    if (field.value.trim() === "") return "";
    const value = Number(field.value);
    if (field.name === "top_p" && value === 0) return "Top p must be more than 0.";
    if (value >= low && value <= high && (!whole || Number.isInteger(value))) return "";
    const range = high >= 1e6 ? `${low} or more` : `${low} to ${high}`;
    return `${LABELS[field.name]} must be ${whole ? "a whole number, " : ""}${range}.`;
  }

  /** The fields of a request. `round`: how many rounds of tools came before; a forced call is forced once. */
  request(round = 0) {
    const body = {};
    for (const name of Object.keys(NUMBERS)) {
      if (this.get(name).trim() !== "") body[name] = Number(this.get(name));
    }
    if (this.get("thinking")) body.chat_template_kwargs = { thinking: this.get("thinking") === "on" };
    const own = readTools(this.get("tools")).tools ?? [];
    const names = new Set(own.map((tool) => tool.function.name));
    const demos = this.get("demo_tools") ? demoTools.filter((tool) => !names.has(tool.function.name)) : [];
    if (demos.length + own.length) {
      body.tools = [...demos, ...own];
      const choice = this.get("tool_choice");
      if (choice && (choice !== "required" || round === 0)) body.tool_choice = choice;
    }
    return body;
  }

  load() {
    let values = {};
    try {
      values = JSON.parse(localStorage.getItem(STORED)) ?? {};
    } catch {
      // Unreadable or forbidden: the fields stay empty.
    }
    for (const field of this.fields()) {
      if (typeof values[field.name] === "boolean" && field.type === "checkbox") field.checked = values[field.name];
      else if (typeof values[field.name] === "string" && field.type !== "checkbox") field.value = values[field.name];
    }
  }

  save() {
    try {
      localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(
        this.fields().map((field) => [field.name, this.get(field.name)]))));
    } catch {
      // They hold until the page is left, then.
    }
  }
}
