// Calls to the server that this page came from. The key, if it needs one, is kept for this tab.

import { jsonEvents } from "./stream.js";

const KEY = "mmi-key";

// An answer that is not what was asked for. status 0: there was no answer.
export class ServerError extends Error {
  constructor(status, code, message, { requestId = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function call(path, { method = "GET", body, signal, requestId = "" } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (requestId) headers["X-Request-Id"] = requestId;
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "unreachable", "The server cannot be reached.", { requestId });
  }
  if (response.ok) return response;
  const about = {
    requestId: response.headers.get("x-request-id") ?? requestId,
    retryAfter: Number(response.headers.get("retry-after")) || null,
  };
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(response.status, error?.code ?? "", error?.message ?? "", about);
}

// {state, documents}: "ready", "starting", "draining", "down" (no engine) or "unreachable", and the
// number of documents that the server works on or keeps waiting.
export async function readiness() {
  try {
    const { documents = null } = await (await call("/health/ready")).json();
    return { state: "ready", documents };
  } catch (error) {
    const states = { starting: "starting", draining: "draining" };
    const state = error.status === 0 ? "unreachable" : states[error.code] ?? "down";
    return { state, documents: null };
  }
}

// The served model: names, samplers, sizes and limits. What the server does not say has a default.
export async function servedModel() {
  const list = await (await call("/v1/models")).json();
  const { id, mmi = {} } = list.data[0];
  const limits = mmi.limits ?? {};
  const samplers = Object.entries(mmi.samplers ?? {}).map(
    ([name, steps]) => ({ name, steps: Number(steps.steps ?? steps) || 0 }));
  return {
    name: id,
    samplers,
    side: Number.parseInt(mmi.sizes?.[0] ?? "64", 10),
    pictures: limits.images ?? null,
    tokens: limits.tokens ?? null,
    parts: limits.parts ?? null,
    body: limits.body_bytes ?? null,
    previews: mmi.previews ?? true,
    // Of a model with one branch, into which it is distilled; others take any.
    guidance: mmi.branches === 1 ? mmi.defaults?.guidance ?? null : null,
    keepAlive: mmi.keep_alive ?? 15,
    picture: { bytes: limits.image_bytes ?? 20 * 2 ** 20, pixels: limits.image_pixels ?? 64e6 },
  };
}

// Events of a streamed response.
export async function* respond(body, { signal, requestId, onSign }) {
  const response = await call(
    "/v1/responses", { method: "POST", body: JSON.stringify(body), signal, requestId });
  onSign();
  try {
    yield* jsonEvents(response.body, onSign);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "lost", "The connection was lost.", { requestId });
  }
}

export async function pictureAt(url, signal) {
  return (await call(url, { signal })).blob();
}
