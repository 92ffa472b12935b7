// One request to /v1/chat/completions and the stream that answers it.

/** What went wrong, in one line for a reader. `status`: the HTTP status, 0 when there was none. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " ").trim().slice(0, 600));
    this.status = status;
  }
}

/** Addresses are relative to the page, so that it also works below a path of a proxy. */
export function address(path) {
  return new URL(path, document.baseURI);
}

/** A request with the API key, if there is one. Answers that are no success become a ServerError. */
export async function call(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, credentials: "same-origin",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let message = "";
  try {
    message = messageOf(JSON.parse(await response.text()));
  } catch {
    // An answer that is no JSON comes from something in between; its number has to do.
  }
  message ||= `The server answered ${response.status} ${response.statusText}`;
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message = `${message.replace(/\.$/, "")}. Try again in ${wait} s.`;
  return new ServerError(message, response.status);
}

function messageOf(answer) {
  const error = answer?.error ?? answer;
  if (typeof error === "string") return error;
  return typeof error?.message === "string" ? error.message : typeof error?.detail === "string" ? error.detail : "";
}

/** The data of each server-sent event, until the stream ends. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      waiting += done ? "\n\n" : value;
      const lines = waiting.split(/\r\n|\n|\r(?!$)/);
      waiting = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    // Leaving early closes the connection, which frees the model's place on the server.
    await reader.cancel().catch(() => {});
  }
}

/**
 * Ask and listen. `onChange(reply)` is called after every event. Returns the reply:
 * {content, reasoning, calls: [{id, name, arguments}], finish, usage, timing: {first, last, thought}} in milliseconds
 * since the request was sent. What had come before an error or a stop is in the reply that `onChange` got.
 */
export async function ask(body, { key, signal, onChange }) {
  const reply = { content: "", reasoning: "", calls: [], finish: null, usage: null,
                  timing: { first: null, last: null, thought: null } };
  const started = performance.now();
  const response = await call("v1/chat/completions", { key, body, signal });
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    throw new ServerError("The server answered with something that is no event stream.", response.status);
  }
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        throw new ServerError("The server sent an event that is no JSON.");
      }
      if (chunk.error) throw new ServerError(messageOf(chunk) || "The server broke off with an error.");
      take(reply, chunk, performance.now() - started);
      onChange(reply);
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new ServerError("The connection was lost in the middle of the reply.");
  }
  if (!ended && !reply.finish) throw new ServerError("The reply broke off: the server closed the connection.");
  return reply;
}

/** Add one chunk to the reply. */
export function take(reply, chunk, now) {
  if (chunk.usage) reply.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
  if (content || reasoning || calls?.length) {
    reply.timing.first ??= now;
    reply.timing.last = now;
  }
  if (reasoning) reply.reasoning += reasoning;
  if ((content || calls?.length) && reply.reasoning) reply.timing.thought ??= now - reply.timing.first;
  if (content) reply.content += content;
  for (const delta of calls ?? []) {
    const call = (reply.calls[delta.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (delta.id) call.id = delta.id;
    if (delta.function?.name) call.name += delta.function.name;
    if (delta.function?.arguments) call.arguments += delta.function.arguments;
  }
  if (choice.finish_reason) reply.finish = choice.finish_reason;
}

/** Tokens a second after the first one came, or null where there is nothing to divide. */
export function speed(reply) {
  const tokens = reply.usage?.completion_tokens;
  const seconds = (reply.timing.last - reply.timing.first) / 1000;
  // What came in one piece was written before it was seen: the clock of this page says nothing about it.
  return tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : null;
}
