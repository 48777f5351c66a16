// The server's two APIs. The key is kept for this tab alone and goes out as a bearer; there
// are no cookies. Paths are relative, so the page also works behind a proxy's prefix.

const KEY = "kvkeep-key";
/** An answer takes longer where the processor is busy with prompts. */
const PATIENCE_MS = 10_000;

/** The server answered, and the answer is no. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

/** Nobody answered. */
export class Gone extends Error {}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export const get = (path) => json(path, { signal: AbortSignal.timeout(PATIENCE_MS) });

export const post = (path, body) => json(path, { ...jsonBody(body), signal: AbortSignal.timeout(PATIENCE_MS) });

async function json(path, options) {
  const response = await ask(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw new Gone(error.message);
  }
}

/** Posts `body` and yields the data of each server-sent event, parsed, until `[DONE]`. */
export async function* events(path, body, signal) {
  const response = await ask(path, { ...jsonBody(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(response.status, event.error.message);
      yield event;
    }
  }
}

function jsonBody(body) {
  return { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone(error.message);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refused(response.status, said?.error?.message ?? `the server answered ${response.status}`);
}
