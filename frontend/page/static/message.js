// Messages on the page. A view is made once for each message and updated while its answer streams.

import { attachmentView } from "./attachments.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { render as renderMarkdown } from "./markdown.js";
import { renderStats, renderTokens } from "./tokens.js";

/**
 * The element of a message.
 *
 * `actions` are what its buttons do: `edit`, `remove` (user); `regenerate`, `remove`, `answerCalls` (assistant).
 */
export function messageView(message, actions) {
  if (message.role === "user") return userView(message, actions);
  if (message.role === "tool") return toolView(message);
  return new AnswerView(message, actions).element;
}

function userView(message, actions) {
  const element = el("article", { class: "message user", "aria-label": "You" });
  if (message.attachments.length) {
    element.append(el("div", { class: "attachments" }, message.attachments.map((item) => attachmentView(item))));
  }
  if (message.text) element.append(el("div", { class: "bubble" }, message.text));
  element.append(
    el(
      "div",
      { class: "actions" },
      copyButton("Copy message", () => message.text),
      iconButton("edit", "Edit and send again", actions.edit),
      iconButton("trash", "Delete message and answer", actions.remove),
    ),
  );
  return element;
}

function toolView(message) {
  return el(
    "article",
    { class: "message tool", "aria-label": "Tool result" },
    el("div", { class: "call" }, el("div", { class: "call-head" }, icon("tool"), `Result of ${message.name}`), el("pre", {}, message.text)),
  );
}

/** An assistant's message; `update()` shows what has come since. */
export class AnswerView {
  #parts = {};

  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = el("article", { class: "message assistant", "aria-label": "Answer" });
    const part = (name, node) => {
      this.#parts[name] = node;
      this.element.append(node);
    };
    const summary = el("summary", { onclick: () => (this.isThoughtToggled = true) }, icon("chevron"), el("span", {}));
    part("thinking", el("details", { class: "thinking", hidden: true }, summary, el("div", { class: "thought" })));
    part("text", el("div", { class: "prose" }));
    part("tokens", el("div", { class: "token-view" }));
    part("calls", el("div", { class: "calls" }));
    part("error", el("p", { class: "error", role: "alert", hidden: true }));
    part("foot", el("div", { class: "foot" }));
    this.stats = el("div", { class: "stats" });
    this.buttons = el(
      "div",
      { class: "actions" },
      copyButton("Copy answer", () => this.message.text),
      iconButton("redo", "Answer again", actions.regenerate),
      iconButton("trash", "Delete answer", actions.remove),
    );
    this.#parts.foot.append(this.buttons, this.stats);
    this.element.view = this;
    this.update();
  }

  update() {
    const { message } = this;
    this.element.classList.toggle("streaming", message.isStreaming);
    this.element.setAttribute("aria-busy", String(message.isStreaming));
    this.#updateThinking();
    renderMarkdown(this.#parts.text, message.text);
    renderTokens(this.#parts.tokens, message.origins);
    this.#updateCalls();
    this.#parts.error.hidden = !message.error;
    this.#parts.error.textContent = message.error ?? "";
    if (message.stats) renderStats(this.stats, message.stats);
    const note = message.isStreaming ? null : NOTES[message.finish];
    if (note) this.stats.append(el("span", { class: "note" }, note));
  }

  #updateThinking() {
    const { message } = this;
    const { thinking } = this.#parts;
    thinking.hidden = !message.reasoning;
    if (thinking.hidden) return;
    const isThinking = message.isStreaming && !message.text && !message.calls.length;
    if (!this.isThoughtToggled) thinking.open = isThinking;
    const seconds = message.thoughtSeconds;
    const label = isThinking ? "Thinking…" : !seconds ? "Thoughts" : seconds < 1 ? "Thought for a moment" : `Thought for ${seconds.toFixed(1)} s`;
    thinking.querySelector("summary span").textContent = label;
    renderMarkdown(thinking.lastElementChild, message.reasoning);
  }

  #updateCalls() {
    const { message } = this;
    const { calls } = this.#parts;
    const isAsked = message.calls.length > 0 && !message.isStreaming && !message.isAnswered && message.finish === "tool_calls";
    const shape = JSON.stringify([message.calls, isAsked]);
    if (shape === this.shownCalls) return;
    this.shownCalls = shape;
    const cards = message.calls.filter(Boolean).map((call) => callView(call, isAsked));
    calls.replaceChildren(...cards);
    if (!isAsked) return;
    const send = () => {
      const results = [...calls.querySelectorAll("textarea")].map((area) => area.value);
      this.actions.answerCalls(results);
    };
    calls.append(el("button", { type: "button", class: "plain", onclick: send }, message.calls.length > 1 ? "Send results" : "Send result"));
  }
}

const NOTES = { length: "Stopped at the token limit", stopped: "Stopped" };

function callView(call, isAsked) {
  const parts = [
    el("div", { class: "call-head" }, icon("tool"), "Calls ", el("code", {}, call.name), copyButton("Copy arguments", () => call.arguments)),
    el("pre", { tabIndex: 0 }, pretty(call.arguments)),
  ];
  if (isAsked) parts.push(el("textarea", { class: "code", rows: 2, placeholder: "What the tool gave", "aria-label": `Result of ${call.name}` }));
  return el("div", { class: "call" }, parts);
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still coming
  }
}
