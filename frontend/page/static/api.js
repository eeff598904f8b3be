// The server's API as the page uses it. Addresses are relative to /ui/, so a proxy may put all of it under a prefix.

export class ApiError extends Error {
  /** `status` 0: no answer at all. */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headersOf(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  try {
    return await fetch(`../${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
}

async function problem(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not JSON: something between the page and the server answered.
  }
  return new ApiError(message, response.status);
}

/** The cards of /v1/models. */
export async function models(key) {
  const response = await ask("v1/models", { headers: headersOf(key) });
  if (!response.ok) throw await problem(response);
  return (await response.json()).data;
}

/** /health, whatever it says; null where nothing answers. */
export async function health() {
  try {
    return await (await ask("health", {})).json();
  } catch {
    return null;
  }
}

/** The chunks of a streamed chat completion. Throws ApiError, or AbortError once `signal` is set. */
export async function* chat(body, key, signal) {
  const headers = { "content-type": "application/json", ...headersOf(key) };
  const response = await ask("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await problem(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError("The connection was lost before the answer was complete.", 0);
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection was lost before the answer was complete.", 0);
      }
      if (part.done) return;
      const lots = (rest + part.value).split("\n\n");
      rest = lots.pop();
      for (const lot of lots) {
        const data = lot.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
