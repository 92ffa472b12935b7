// Tools that the page itself can run, so that one can watch a model use them, and a check of tools that a user types.

const MAX_LENGTH = 400;
const MAX_DEPTH = 40;
const FUNCTIONS = {
  sqrt: Math.sqrt, abs: Math.abs, floor: Math.floor, ceil: Math.ceil, round: Math.round, ln: Math.log, log: Math.log10,
  exp: Math.exp, sin: Math.sin, cos: Math.cos, tan: Math.tan, min: Math.min, max: Math.max,
};
const CONSTANTS = { pi: Math.PI, e: Math.E };

/** The value of an arithmetic expression: + - * / % ^ ** ( ), a few functions. Nothing is ever evaluated as code. */
export function arithmetic(text) {
  if (text.length > MAX_LENGTH) throw new Error(`the expression is longer than ${MAX_LENGTH} characters`);
  const tokens = text.match(/\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+|[a-z]+|\*\*|[-+*/%^(),×÷−·]|\S/gi) ?? [];
  let at = 0;
  let depth = 0;
  const next = (...wanted) => wanted.includes(tokens[at]) && tokens[at++];
  const expect = (sign) => {
    if (!next(sign)) throw new Error(tokens[at] === undefined ? `${sign} is missing at the end` : `unexpected ${tokens[at]}`);
  };
  function sum() {
    if (++depth > MAX_DEPTH) throw new Error("too many levels");
    let value = product();
    for (let sign; (sign = next("+", "-", "−")); ) value = sign === "+" ? value + product() : value - product();
    depth -= 1;
    return value;
  }
  function product() {
    let value = signed();
    for (let sign; (sign = next("*", "/", "%", "×", "÷", "·")); ) {
      const right = signed();
      if (right === 0 && "/÷%".includes(sign)) throw new Error("division by zero");
      if (sign === "%") value = modulo(value, right);
      else value = "/÷".includes(sign) ? value / right : value * right;
    }
    return value;
  }
  function signed() {
    let factor = 1;
    for (let sign; (sign = next("-", "−", "+")); ) if (sign !== "+") factor = -factor;
    return factor * power();
  }
  function power() {
    const base = operand();
    if (!next("^", "**")) return base;
    if (++depth > MAX_DEPTH) throw new Error("too many levels");
    const value = base ** signed();
    depth -= 1;
    return value;
  }
  function operand() {
    const token = tokens[at++];
    if (token === undefined) throw new Error("a number is missing at the end");
    if (/^[\d.]/.test(token)) return Number(token);
    if (token === "(") {
      const value = sum();
      expect(")");
      return value;
    }
    const name = token.toLowerCase();
    if (Object.hasOwn(CONSTANTS, name)) return CONSTANTS[name];
    if (!Object.hasOwn(FUNCTIONS, name)) throw new Error(`unexpected ${token}`);
    expect("(");
    const values = [sum()];
    while (next(",")) values.push(sum());
    expect(")");
    return FUNCTIONS[name](...values);
  }
  const value = sum();
  if (at < tokens.length) throw new Error(`unexpected ${tokens[at]}`);
  if (!Number.isFinite(value)) throw new Error("the result is no finite number");
  return value;
}

/** The remainder with the sign of the divisor, exact for large values too. */
function modulo(value, divisor) {
  const rest = value % divisor;
  return rest && rest < 0 !== divisor < 0 ? rest + divisor : rest;
}

/** A number as a person writes it: with two decimals at most, and with three digits where it is small. */
export function shown(value) {
  if (Number.isInteger(value)) return String(value);
  return String(Number(Math.abs(value) < 0.1 ? value.toPrecision(3) : value.toFixed(2)));
}

// Unit to [what it measures, how many of that measure's base unit it is].
const UNITS = {
  km: ["length", 1000], m: ["length", 1], cm: ["length", 0.01], mm: ["length", 0.001],
  mi: ["length", 1609.344], yd: ["length", 0.9144], ft: ["length", 0.3048], in: ["length", 0.0254],
  t: ["mass", 1000], kg: ["mass", 1], g: ["mass", 0.001], lb: ["mass", 0.45359237], oz: ["mass", 0.028349523125],
  d: ["time", 86400], h: ["time", 3600], min: ["time", 60], s: ["time", 1], l: ["volume", 1], ml: ["volume", 0.001],
};

function convert(value, unit, to) {
  if (typeof value !== "number") throw new Error("value must be a number");
  const known = Object.hasOwn(UNITS, unit) && Object.hasOwn(UNITS, to) && UNITS[unit][0] === UNITS[to][0];
  if (!known) throw new Error(`cannot convert ${unit} to ${to}`);
  return (value * UNITS[unit][1]) / UNITS[to][1];
}

const describe = (name, description, kinds) => ({
  type: "function",
  function: {
    name, description,
    parameters: {
      type: "object",
      properties: Object.fromEntries(Object.entries(kinds).map(([field, type]) => [field, { type }])),
      required: Object.keys(kinds),
    },
  },
});

// Declared as in the practice dialogues of `moonbase quickstart`, so that a small model knows them.
const DEMOS = {
  calculator: {
    tool: describe("calculator", "Compute an expression.", { expression: "string" }),
    run: ({ expression }) => shown(arithmetic(String(expression))),
  },
  convert: {
    tool: describe("convert", "Convert a value to another unit.", { value: "number", unit: "string", to: "string" }),
    run: ({ value, unit, to }) => shown(convert(value, String(unit), String(to))),
  },
};

export const demoTools = Object.values(DEMOS).map((demo) => demo.tool);

/** What the page computes for a call, as text, or null where the tool is not one of its own. */
export function runDemo(name, text) {
  if (!Object.hasOwn(DEMOS, name)) return null;
  try {
    const values = JSON.parse(text);
    if (values === null || typeof values !== "object") throw new Error("the arguments are no JSON object");
    return DEMOS[name].run(values);
  } catch (error) {
    // The model is told what was wrong, as any tool would tell it.
    return `error: ${error.message}`;
  }
}

/** Tools that a user typed: {tools} or {error}, one line that says where. */
export function readTools(text) {
  if (!text.trim()) return { tools: [] };
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    return { error: `No valid JSON: ${error.message}` };
  }
  if (!Array.isArray(tools)) return { error: "A list of tools is wanted: [ … ]" };
  const names = new Set();
  for (const [number, tool] of tools.entries()) {
    const place = `tools[${number}]`;
    if (tool?.type !== "function") return { error: `${place}.type must be "function"` };
    const name = tool.function?.name;
    if (typeof name !== "string" || !/^[\w-]{1,64}$/.test(name)) {
      return { error: `${place}.function.name must be letters, digits, _ or -` };
    }
    if (names.has(name)) return { error: `${place}: the name ${name} occurs twice` };
    names.add(name);
    const { parameters } = tool.function;
    if (parameters !== undefined && (parameters === null || typeof parameters !== "object" || Array.isArray(parameters))) {
      return { error: `${place}.function.parameters must be a JSON Schema object` };
    }
  }
  return { tools };
}
