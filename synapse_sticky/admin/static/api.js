// SPDX-License-Identifier: AGPL-3.0-or-later
// Asks the admin API. The token is kept for this tab, and sent in a header only.

const KEY = "synapse_sticky.access_token";
// This file is at page/api.js below the API, whatever stands in front of that.
const BASE = new URL("../", import.meta.url);
const TIMEOUT_MS = 30_000;

let memory = null;
let clockOffsetMs = 0;
let onSignedOut = () => {};

// An answer that is no success, or none at all, as a sentence for the admin.
export class ApiError extends Error {
  constructor(message, { status = 0, retryTs = null, retryAfterMs = null } = {}) {
    super(message);
    this.status = status;
    this.retryTs = retryTs;
    this.retryAfterMs = retryAfterMs;
  }
}

export function token() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

function keepToken(value) {
  memory = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // Without storage it lasts until the page is reloaded.
  }
}

export function whenSignedOut(listener) {
  onSignedOut = listener;
}

export function signOut(reason = "") {
  keepToken(null);
  onSignedOut(reason);
}

// Returns the status of the server if it takes this token for that of an admin.
export async function signIn(candidate) {
  // What a header cannot hold is no token.
  if (!/^[\x21-\x7e]+$/.test(candidate)) {
    throw new ApiError("An access token has letters, digits and punctuation only, and no spaces.");
  }
  const status = await send("GET", "status", { token: candidate });
  keepToken(candidate);
  return status;
}

// The server's time in ms since the epoch, within a second, however this computer's clock is set.
export function serverNow() {
  return Date.now() + clockOffsetMs;
}

// A path of the API from its parts, which may hold anything.
export function path(...parts) {
  return parts.map(encodeURIComponent).join("/");
}

export function get(path, parameters = {}, signal) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value != null);
  const query = new URLSearchParams(given).toString();
  return call("GET", query === "" ? path : `${path}?${query}`, { signal });
}

export function put(path, body) {
  return call("PUT", path, { body });
}

export function retry(serverName) {
  return call("POST", `servers/${path(serverName)}/retry`);
}

// Synapse's own admin API ends its waiting for a server that did not answer.
export function endBackOff(serverName) {
  const destination = `federation/destinations/${path(serverName)}/reset_connection`;
  return call("POST", `../../../../admin/v1/${destination}`, { body: {} });
}

async function call(method, path, options = {}) {
  const used = token();
  try {
    return await send(method, path, { ...options, token: used });
  } catch (error) {
    if (error.status === 401 && token() === used) signOut(error.message);
    throw error;
  }
}

async function send(method, path, { token, body, signal }) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  let response;
  let text;
  try {
    response = await fetch(new URL(path, BASE), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      referrerPolicy: "no-referrer",
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    });
    text = await response.text();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(
      timeout.aborted
        ? "The server did not answer within half a minute."
        : "The server cannot be reached. Is it running, and are you online?",
    );
  }
  const date = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(date)) clockOffsetMs = date - Date.now();
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A reverse proxy answers with pages of its own.
  }
  if (response.ok && answer !== null) return answer;
  throw errorOf(response.status, answer);
}

function errorOf(status, answer) {
  const code = answer?.errcode;
  const said = typeof answer?.error === "string" ? answer.error : "";
  const details = {
    status,
    retryTs: Number.isInteger(answer?.retry_ts) ? answer.retry_ts : null,
    retryAfterMs: Number.isInteger(answer?.retry_after_ms) ? answer.retry_after_ms : null,
  };
  return new ApiError(sentenceOf(status, code, said), details);
}

function sentenceOf(status, code, said) {
  if (status === 401) return "The server does not accept this access token, or not any more.";
  if (status === 403 && code === "M_FORBIDDEN") {
    return "This account is not an admin of this server.";
  }
  if (status === 403) return "The reverse proxy in front of Synapse refuses this request (403).";
  if (status === 404 && code === "M_NOT_FOUND") {
    return asSentence(said || "This server does not know that");
  }
  if (status === 404) {
    return "Nothing answers at this address. Does the reverse proxy pass it on to Synapse?";
  }
  if (status === 429) return "The server asks for a pause: there were too many requests.";
  if ([502, 503, 504].includes(status) && !code) {
    return `Synapse does not answer the reverse proxy (${status}). It may be restarting.`;
  }
  if (status >= 500) return `The server failed to answer (${status}). Its log says why.`;
  if (said) return asSentence(said);
  return `The server answered in a way that this page does not understand (${status}).`;
}

function asSentence(text) {
  const trimmed = text.trim();
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}
