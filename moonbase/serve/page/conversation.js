// The conversation: turns as the page keeps them, what is sent of them, and their copy in the browser's storage.
//
// A turn is {role: "user", content}, {role: "tool", id, name, content} or
// {role: "assistant", content, reasoning, calls, finish, usage, timing, error, status}.

const STORED = "moonbase.conversation";
const MAX_STORED = 500_000;  // characters; browsers grant about five million to everything together

export class Conversation {
  constructor() {
    this.turns = read();
  }

  add(turn) {
    this.turns.push(turn);
    return turn;
  }

  clear() {
    this.turns = [];
    this.save();
  }

  /** The number of the last turn that the user wrote, or -1. */
  get lastQuestion() {
    return this.turns.findLastIndex((turn) => turn.role === "user");
  }

  /** Forget turn `number` and what follows. */
  cut(number) {
    this.turns.length = number;
    this.save();
  }

  /** The result that a call got, or null. `number`: the turn that made the call. */
  result(number, id) {
    for (const turn of this.turns.slice(number + 1)) {
      if (turn.role === "user") return null;
      if (turn.role === "tool" && turn.id === id) return turn.content;
    }
    return null;
  }

  /** OpenAI messages. Calls that were never answered and replies that hold nothing are left out. */
  messages(system) {
    const messages = system.trim() ? [{ role: "system", content: system }] : [];
    for (const [number, turn] of this.turns.entries()) {
      if (turn.role === "user") messages.push({ role: "user", content: turn.content });
      if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.id, content: turn.content });
      if (turn.role !== "assistant") continue;
      const calls = turn.calls.filter((call) => this.result(number, call.id) !== null);
      if (!turn.content && !calls.length) continue;
      messages.push({
        role: "assistant", content: turn.content,
        ...(turn.reasoning && { reasoning_content: turn.reasoning }),
        ...(calls.length && {
          tool_calls: calls.map((call) => ({
            id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
          })),
        }),
      });
    }
    return messages;
  }

  /** Keep a copy; the oldest exchanges stay behind where all of them are too long. */
  save() {
    const turns = [...this.turns];
    for (;;) {
      const text = JSON.stringify(turns);
      if (text.length <= MAX_STORED && store(text)) return;
      if (!turns.length) return;
      const next = turns.findIndex((turn, number) => number > 0 && turn.role === "user");
      turns.splice(0, next < 0 ? turns.length : next);
    }
  }
}

function store(text) {
  try {
    localStorage.setItem(STORED, text);
    return true;
  } catch {
    return false;
  }
}

function read() {
  try {
    const turns = JSON.parse(localStorage.getItem(STORED));
    return Array.isArray(turns) ? turns.filter(isTurn) : [];
  } catch {
    return [];
  }
}

function isTurn(turn) {
  return ["user", "assistant", "tool"].includes(turn?.role) && typeof turn.content === "string"
    && (turn.role !== "assistant" || (Array.isArray(turn.calls) && typeof turn.reasoning === "string" && turn.timing));
}
