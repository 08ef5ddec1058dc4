// The server's routes → names of models, and the events of one answer.
//
// Answers come from OpenAI's route, whose messages hold pictures, videos and documents in the order they were given;
// models come from Ollama's, which says what they can do. This module knows addresses, headers and the stream's format,
// and nothing of the page. Addresses are relative to the page, so a reverse proxy may put the server under any path.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server did not answer at all
  }
}

/** Models that the server can answer with, in its order: `{name, thinks, notice}`; the notice is for the user to read. */
export async function listModels(key) {
  const response = await request("api/tags", { headers: withKey({}, key) });
  const { models } = await response.json();
  return models.map(({ name, capabilities, details }) => ({
    name,
    thinks: !capabilities || capabilities.includes("thinking"),
    notice: details?.notice ?? "",
  }));
}

/**
 * Ask, and yield events: `{kind: "thinking" | "answer", text}`, and at the end `{kind: "end", reason, tokens,
 * seconds}`, where the seconds are `decode` and `image`. Throws ApiError, also mid-stream; aborting the signal closes
 * the connection, which stops the work on the server.
 *
 * Messages are `{role, text, files: [{kind, name, uri}]}`, each uri a data: URI.
 */
export async function* streamAnswer({ model, messages, think, key, signal }) {
  const body = JSON.stringify({
    model,
    messages: messages.map(({ role, text, files = [] }) => ({ role, content: files.length ? [...files.map(partOf), { type: "text", text }] : text })),
    chat_template_kwargs: { enable_thinking: think },
    stream: true,
    stream_options: { include_usage: true },
  });
  const headers = withKey({ "Content-Type": "application/json" }, key);
  const response = await request("v1/chat/completions", { method: "POST", headers, body, signal });
  let reason = null;
  let last = {};
  for await (const line of linesOf(response.body)) {
    if (!line.startsWith("data:")) continue; // a comment: the server is still working
    const data = line.slice(5).trim();
    if (data === "[DONE]") return yield endOf(reason, last);
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    const [choice] = chunk.choices;
    const { reasoning_content: thinking, content } = choice?.delta ?? {};
    if (thinking) yield { kind: "thinking", text: thinking };
    if (content) yield { kind: "answer", text: content };
    reason = choice?.finish_reason ?? reason;
    if (chunk.usage) last = chunk;
  }
  throw new ApiError("The connection ended before the answer did; ask again.");
}

function partOf({ kind, name, uri }) {
  if (kind === "pdf") return { type: "file", file: { filename: name, file_data: uri } };
  return { type: `${kind}_url`, [`${kind}_url`]: { url: uri } };
}

function endOf(reason, { usage, timings }) {
  const seconds = { decode: (timings?.predicted_ms ?? 0) / 1000, image: (timings?.image_ms ?? 0) / 1000 };
  return { kind: "end", reason, tokens: usage?.completion_tokens ?? 0, seconds };
}

function withKey(headers, key) {
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let reason = `The server answered ${response.status} ${response.statusText}.`;
  try {
    const { error } = await response.json();
    reason = error?.message ?? error ?? reason;
  } catch {
    // Not JSON, perhaps a proxy's page; the status has to do.
  }
  throw new ApiError(reason, response.status);
}

async function* linesOf(stream) {
  let rest = "";
  for await (const text of chunksOf(stream.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    yield* lines;
  }
  yield rest;
}

// Safari cannot iterate over a stream.
async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // the caller stopped reading and wants no more
  }
}
