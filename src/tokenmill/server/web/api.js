// Calls to the server: with the key if one is needed, errors as the server words them, streams event by event.

import { byId } from "./dom.js";

const KEY = "tokenmill.key"; // in sessionStorage: gone with the tab

/** An answer that is an error, or none. `status` is 0 if the server could not be reached. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** GET, or POST if there is a `body`. Asks for a key as long as the server wants another one. Throws ApiError. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key === null ? {} : { authorization: `Bearer ${key}` };
    const options = { signal, headers, cache: "no-store" };
    if (body !== undefined) {
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
      headers["content-type"] = "application/json";
    }
    const response = await fetch(path, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.", 0);
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    if (sessionStorage.getItem(KEY) === key) {
      await askForKey(key === null ? "This server wants an API key." : "The server does not take this key.");
    }
  }
}

/** The JSON that GET gives. */
export async function get(path) {
  return (await call(path)).json();
}

/** The events of a stream, parsed. Throws ApiError for an event that is an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection to the server was lost.", 0);
    });
    if (done) throw new ApiError("The server ended the answer before it was complete.", 0);
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part
        .split("\n")
        .filter((line) => line.startsWith("data: "))
        .map((line) => line.slice("data: ".length))
        .join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment that keeps the connection open
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, 500);
      yield event;
    }
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(body?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

let asking = null;

/** Resolves when there is a new key. Throws ApiError if none is given. Whoever asks meanwhile waits for the same. */
function askForKey(reason) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    const field = byId("key");
    byId("key-reason").textContent = reason;
    field.value = "";
    dialog.returnValue = "";
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "use" && field.value) {
        sessionStorage.setItem(KEY, field.value.trim());
        resolve();
        document.dispatchEvent(new Event("newkey"));
      } else {
        reject(new ApiError("Without a key the server does not answer. Send again to be asked for one.", 401));
      }
      field.value = "";
    };
    dialog.showModal();
  });
  return asking;
}
