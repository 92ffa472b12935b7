// Elements and words. Text from a trace becomes text nodes, and nothing else, here and everywhere.

const $ = (id) => document.getElementById(id);

/** An element with attributes (onclick and the like as functions) and children; null children are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const count = (value) => Math.round(value).toLocaleString("en-US");

function compact(value) {
  if (Math.abs(value) < 10000) return count(value);
  const [scaled, unit] = Math.abs(value) < 1e6 ? [value / 1e3, "k"] : Math.abs(value) < 1e9 ? [value / 1e6, "M"] : [value / 1e9, "G"];
  return (Math.abs(scaled) < 100 ? scaled.toFixed(1).replace(/\.0$/, "") : scaled.toFixed(0)) + unit;
}

function duration(seconds) {
  if (seconds < 0.0005) return "0 s";
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

function dollars(value) {
  if (!value) return "$0";
  return value < 0.0001 ? "<$0.0001" : `$${value.toFixed(value < 0.01 ? 4 : value < 1 ? 3 : 2)}`;
}

const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const amount = (axis, value) => axis === "seconds" ? duration(value) : axis === "steps" ? plural(value, "step") : `${compact(value)} tokens`;
const oneLine = (text, most = 240) => text.slice(0, most * 2).replace(/\s+/g, " ").trim().slice(0, most);

/** Do something once the events of this moment are over. */
function later(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; work(); });
  };
}
