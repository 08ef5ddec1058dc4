// The server's routes → names of models, and the events of one answer.
//
// Answers come from OpenAI's route, whose messages hold pictures, videos and documents in the order they were given;
// models come from Ollama's, which says what they can do. This module knows addresses, headers and the stream's format,
// and nothing of the page. Addresses are relative to the page, so a reverse proxy may put the server under any path.

import { t } from "./language.js";

const CUT = t("The connection ended before the answer did. What came so far is kept; continue it, or ask again.");

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server did not answer at all
  }
}

/**
 * Models that the server can answer with, in its order: `{name, thinks, notice, bytes, parameters, type}`; the notice is
 * for the user to read.
 */
export async function listModels(key) {
  const response = await request("api/tags", { headers: withKey({}, key) });
  const { models } = await response.json();
  return models.map(({ name, capabilities, details, size }) => ({
    name,
    thinks: !capabilities || capabilities.includes("thinking"),
    notice: details?.notice ?? "",
    bytes: size,
    parameters: details?.parameter_size ?? "",
    type: details?.quantization_level ?? "",
  }));
}

/** Tokens of the contexts of the models in memory, by name. */
export async function contexts(key) {
  const response = await request("api/ps", { headers: withKey({}, key) });
  const { models } = await response.json();
  return new Map(models.map(({ name, context_length: size }) => [name, size]));
}

/**
 * Memory and models, as edge_runtime/server/page_facts.py has them: `{memory: {total, free}, models: [{name, needs, loaded,
 * kept}], offered: [{name, needs}]}`, all in bytes.
 */
export async function modelFacts(key) {
  return (await request("page/models", { headers: withKey({}, key) })).json();
}

/** Fetch a model to the server: yields `{status, share, done, total}`, bytes where known; aborting the signal ends it. */
export async function* pullModel(name, key, signal) {
  const headers = withKey({ "Content-Type": "application/json" }, key);
  const response = await request("api/pull", { method: "POST", headers, body: JSON.stringify({ model: name }), signal });
  for await (const line of linesOf(response.body, signal)) {
    if (!line.trim()) continue;
    const { status, completed = 0, total = 0, error } = JSON.parse(line);
    if (error) throw new ApiError(error, response.status);
    yield { status, done: completed, total, share: total ? completed / total : null };
  }
}

/** Pages of a document, `{pages: [{number, picture}]}`, or frames of a video, `{frames, groups, storyboard}`; pictures as URIs. */
export async function preview(file, key, signal) {
  const headers = withKey({ "Content-Type": "application/json" }, key);
  return (await request("page/preview", { method: "POST", headers, body: JSON.stringify({ part: partOf(file) }), signal })).json();
}

export async function deleteModel(name, key) {
  const headers = withKey({ "Content-Type": "application/json" }, key);
  await request("api/delete", { method: "DELETE", headers, body: JSON.stringify({ model: name }) });
}

/**
 * Ask, and yield events: `{kind: "progress", stage, share}` before the first word, where the stage is "decode" (of a
 * video), "encode" or "prefill"; `{kind: "thinking" | "answer", text, rate}`; and at the end `{kind: "end", reason,
 * tokens, context, seconds}`, where the seconds are `decode` and `image`, and the context's tokens are all that the model
 * has read and written. Throws ApiError, also mid-stream; aborting the signal closes the connection, which stops the
 * work on the server.
 *
 * Messages are `{role, text, files: [{kind, name, uri, pages}]}`, each uri a data: URI; the last one is the answer so
 * far if it `continues`. `fields` are further fields of the request.
 */
export async function* streamAnswer({ model, messages, think, continues, fields, key, signal }) {
  const body = JSON.stringify({
    ...fields,
    model,
    messages: messages.map(({ role, text, files = [] }) => ({ role, content: files.length ? [...files.map(partOf), { type: "text", text }] : text })),
    chat_template_kwargs: { enable_thinking: think },
    ...(continues ? { continue_final_message: true } : {}),
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    timings_per_token: true,
  });
  const headers = withKey({ "Content-Type": "application/json" }, key);
  const response = await request("v1/chat/completions", { method: "POST", headers, body, signal });
  let reason = null;
  let last = {};
  for await (const line of linesOf(response.body, signal)) {
    const progress = progressOf(line);
    if (progress) yield progress;
    if (!line.startsWith("data:")) continue; // a comment: the server is still working
    const data = line.slice(5).trim();
    if (data === "[DONE]") return yield endOf(reason, last);
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    const [choice] = chunk.choices;
    const { reasoning_content: thinking, content } = choice?.delta ?? {};
    const rate = chunk.timings?.predicted_per_second;
    if (chunk.prompt_progress) yield { kind: "progress", stage: "prefill", share: shareOf(chunk.prompt_progress) };
    if (thinking) yield { kind: "thinking", text: thinking, rate };
    if (content) yield { kind: "answer", text: content, rate };
    reason = choice?.finish_reason ?? reason;
    if (chunk.usage) last = chunk;
  }
  throw new ApiError(CUT);
}

function partOf({ kind, name, uri, pages }) {
  if (kind === "pdf") return { type: "file", file: { filename: name, file_data: uri }, ...(pages ? { pages } : {}) };
  return { type: `${kind}_url`, [`${kind}_url`]: { url: uri } };
}

/** Progress in a comment of the stream: its stage, finished parts, all parts, and the share that is done. */
function progressOf(line) {
  const found = /^: working (decode|encode|prefill) \d+ \d+ ([\d.]+)$/.exec(line);
  return found && { kind: "progress", stage: found[1], share: Number(found[2]) };
}

const shareOf = ({ total, cache, processed }) => (processed - cache) / Math.max(1, total - cache);

function endOf(reason, { usage, timings }) {
  const seconds = { decode: (timings?.predicted_ms ?? 0) / 1000, image: (timings?.image_ms ?? 0) / 1000 };
  return { kind: "end", reason, tokens: usage?.completion_tokens ?? 0, context: usage?.total_tokens ?? 0, seconds };
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
    throw new ApiError(t("The server does not answer. Is it still running?"));
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

async function* linesOf(stream, signal) {
  let rest = "";
  try {
    for await (const text of chunksOf(stream.pipeThrough(new TextDecoderStream()))) {
      const lines = (rest + text).split("\n");
      rest = lines.pop();
      yield* lines;
    }
  } catch (error) {
    // Browsers have their own words for a cut connection ("network error", "Load failed").
    throw signal?.aborted || error instanceof ApiError ? error : new ApiError(CUT);
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
