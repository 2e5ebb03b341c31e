// Talking to the server: JSON, and streams of events read from a fetch so that a key can be sent.

const KEY = "rvllm-key";

export function key() {
  try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; }
}

export function setKey(value) {
  try { sessionStorage.setItem(KEY, value); } catch { /* storage is off: the key is asked for again */ }
}

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function request(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `the server answers ${response.status}`;
  try { message = (await response.json()).error.message || message; } catch { /* not an error object */ }
  throw new ApiError(response.status, message);
}

// Yields the JSON of each event up to [DONE]; however the bytes were cut on the way.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const lines = pending.split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code || 500, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
