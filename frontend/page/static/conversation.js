// A chat as data: its messages, what a request is made of, and what chunks add to an answer.

import { contentPart } from "./attachments.js";
import { Meter } from "./tokens.js";

export function newChat() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", updated: Date.now(), messages: [] };
}

/** The list shows a chat under its first words. */
export function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  if (first === undefined) return "New chat";
  return first.text.trim().replace(/\s+/g, " ").slice(0, 80) || (first.attachments[0]?.kind === "audio" ? "A clip" : "An image");
}

export function userMessage(text, attachments) {
  return { role: "user", text, attachments };
}

export function toolMessage(call, text) {
  return { role: "tool", callId: call.id, name: call.name, text };
}

/** `origins` is a list of [text, origin] for each token. `finish` is the API's word, or "stopped" by the reader. */
export function emptyAnswer() {
  return {
    role: "assistant", text: "", reasoning: "", calls: [], origins: [], stats: null, error: null, finish: null,
    isStreaming: true, isAnswered: false, thoughtSeconds: null,
  }; // prettier-ignore
}

/** Messages in the API's form. An answer that failed before its first word is left out. */
export function requestMessages(messages, system) {
  const out = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "user") {
      const parts = message.attachments.map(contentPart);
      if (message.text) parts.push({ type: "text", text: message.text });
      out.push({ role: "user", content: message.attachments.length ? parts : message.text });
    } else if (message.role === "tool") {
      out.push({ role: "tool", tool_call_id: message.callId, content: message.text });
    } else if (message.text || message.calls.length) {
      const sent = { role: "assistant", content: message.text || null };
      if (message.reasoning) sent.reasoning_content = message.reasoning;
      if (message.calls.length) {
        sent.tool_calls = message.calls.map((call) => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments || "{}" },
        }));
      }
      out.push(sent);
    }
  }
  return out;
}

function isObject(json) {
  try {
    return typeof JSON.parse(json) === "object";
  } catch {
    return false;
  }
}

/** Takes the chunks of one answer into its message. */
export class Reception {
  constructor(message) {
    this.message = message;
    this.meter = new Meter();
    message.stats = this.meter.stats;
    this.thoughtStart = null;
  }

  add(chunk) {
    const { message } = this;
    const [choice] = chunk.choices;
    if (choice === undefined) return;
    if (choice.tandem) {
      for (const { text, origin } of choice.tandem.origins) message.origins.push([text, origin]);
      this.meter.add(choice.tandem);
    }
    const { delta } = choice;
    if (delta.reasoning_content) {
      this.thoughtStart ??= performance.now();
      message.reasoning += delta.reasoning_content;
    }
    if ((delta.content || delta.tool_calls) && this.thoughtStart !== null && message.thoughtSeconds === null) {
      message.thoughtSeconds = (performance.now() - this.thoughtStart) / 1000;
    }
    message.text += delta.content ?? "";
    for (const part of delta.tool_calls ?? []) {
      const call = (message.calls[part.index] ??= { id: "", name: "", arguments: "" });
      if (part.id) call.id = part.id;
      if (part.function?.name) call.name = part.function.name;
      call.arguments += part.function?.arguments ?? "";
    }
    if (choice.finish_reason) message.finish = choice.finish_reason;
    if (chunk.timings) this.meter.end(chunk.timings);
  }

  /** The stream has ended, by itself or not. */
  close() {
    // A call that was cut off, or turned out malformed, came again as text: it is none.
    this.message.calls = this.message.calls.filter((call) => call && isObject(call.arguments));
    this.message.isStreaming = false;
  }
}
