// The page: one chat at a time, its list beside it, the composer below.

import { ApiError, chat as streamChat, health, models } from "./api.js";
import { attachment, attachmentView } from "./attachments.js";
import {
  Reception, emptyAnswer, newChat, requestMessages, titleOf, toolMessage, userMessage,
} from "./conversation.js"; // prettier-ignore
import { el, iconButton } from "./dom.js";
import { messageView } from "./message.js";
import { Settings } from "./settings.js";
import { ChatStore, load, save } from "./store.js";

const SAVE_MS = 700; // while an answer streams it is kept this often, so that a reload loses little
const HEALTH_MS = 3000; // between two looks at a server that is not ready
const NEAR_END_PX = 80;
const STARTERS = ["Explain speculative decoding in three sentences.", "Write a haiku about bicycles.", "Which number is larger, 9.9 or 9.11?"];

const $ = (id) => document.getElementById(id);
const isPhone = matchMedia("(max-width: 760px)");

class Page {
  constructor() {
    this.store = new ChatStore();
    this.chat = newChat();
    this.pending = []; // attachments of the message that is being written
    this.modalities = ["text"];
    this.running = null; // AbortController of the answer that streams
    this.editFrom = null; // index of the message that is being written anew
    this.settings = new Settings($("settings"), () => this.connect(), () => this.showModel());
  }

  async start() {
    this.settings.applyTheme();
    this.showView(load(localStorage, "view", "text"));
    this.listen();
    await this.store.open();
    const chats = await this.store.all();
    const last = load(sessionStorage, "chat", null) ?? load(localStorage, "chat", null);
    this.show(chats.find((chat) => chat.id === last) ?? newChat());
    await this.connect();
  }

  // ------------------------------------------------------------ server

  /** Ask who is there; again and again until a model is ready. */
  async connect() {
    clearTimeout(this.connecting);
    const state = await health();
    const isReady = state?.status === "ok";
    this.setState(state === null ? "offline" : isReady ? "ready" : "starting", state);
    if (isReady) await this.readModels();
    else this.connecting = setTimeout(() => this.connect(), HEALTH_MS);
  }

  setState(name, state) {
    const place = $("model-state");
    place.dataset.state = name;
    place.textContent = { ready: "ready", starting: "starting", offline: "no answer", locked: "API key needed" }[name];
    if (state?.model) this.showModel(state.model);
    if (state?.input_modalities) this.setModalities(state.input_modalities);
  }

  /** Whom one talks with: the model of /health until there is a choice. */
  showModel(name = this.settings.model) {
    $("model-name").textContent = name;
    document.title = `${name} · Tandem`;
  }

  async readModels() {
    try {
      this.settings.setModels(await models(this.settings.key));
      this.showModel();
      this.notify("");
    } catch (error) {
      if (error.status !== 401) throw error;
      this.setState("locked");
      this.notify("This server asks for an API key: enter it in the settings.");
    }
  }

  setModalities(modalities) {
    this.modalities = modalities;
    $("attach-image").hidden = !modalities.includes("image");
    $("attach-audio").hidden = !modalities.includes("audio");
    const takes = modalities.filter((kind) => kind !== "text");
    $("welcome-model").textContent = `${$("model-name").textContent} reads text${takes.map((kind) => ` and ${kind === "image" ? "images" : kind}`).join("")}. Chats stay in this browser.`;
  }

  notify(text) {
    $("notice").hidden = !text;
    $("notice").textContent = text;
  }

  // ------------------------------------------------------------ chats

  /** Make this the chat on the page. */
  show(chat) {
    this.stop();
    this.chat = chat;
    save(sessionStorage, "chat", chat.id);
    save(localStorage, "chat", chat.id);
    for (const message of chat.messages) {
      if (message.isStreaming) Object.assign(message, { isStreaming: false, finish: message.finish ?? "stopped" }); // the page was left
    }
    this.cancelEdit();
    this.drawMessages();
    this.drawList();
    this.toEnd();
    this.openSidebar(false);
    if (!isPhone.matches) $("prompt").focus();
  }

  async keep() {
    this.chat.updated = Date.now();
    this.chat.title = titleOf(this.chat);
    if (!this.chat.messages.length) return;
    try {
      await this.store.put(this.chat);
    } catch (error) {
      this.notify(`This chat is not kept: ${error.message}`);
    }
    await this.drawList();
  }

  async drawList() {
    const chats = await this.store.all();
    const entries = chats.map((chat) => {
      const isCurrent = chat.id === this.chat.id;
      const open = el("button", { class: "open", type: "button", "aria-current": isCurrent ? "true" : null, title: chat.title, onclick: () => this.show(chat) }, chat.title);
      const remove = iconButton("trash", `Delete chat ${chat.title}`, () => this.deleteChat(chat));
      return el("div", { class: "chat-entry" }, open, remove);
    });
    $("chat-list").replaceChildren(...entries);
  }

  async deleteChat(chat) {
    if (chat.id === this.chat.id) this.show(newChat());
    await this.store.delete(chat.id);
    await this.drawList();
  }

  async deleteAll() {
    if (!confirm("Delete every chat in this browser?")) return;
    this.show(newChat());
    await this.store.clear();
    await this.drawList();
    $("settings").close();
  }

  // ------------------------------------------------------------ messages

  drawMessages() {
    $("messages").replaceChildren(...this.chat.messages.map((message) => messageView(message, this.actionsOf(message))));
    $("welcome").hidden = this.chat.messages.length > 0;
  }

  actionsOf(message) {
    const place = () => this.chat.messages.indexOf(message);
    return {
      edit: () => this.edit(place()),
      remove: () => this.remove(place()),
      regenerate: () => this.regenerate(place()),
      answerCalls: (results) => this.answerCalls(message, results),
    };
  }

  append(message) {
    this.chat.messages.push(message);
    const element = messageView(message, this.actionsOf(message));
    $("messages").append(element);
    $("welcome").hidden = true;
    return element.view;
  }

  /** Drop messages from `index` on. */
  truncate(index) {
    this.stop();
    this.chat.messages.length = index;
    const previous = this.chat.messages.at(-1);
    if (previous?.isAnswered) previous.isAnswered = false;
    this.drawMessages();
  }

  edit(index) {
    const message = this.chat.messages[index];
    this.editFrom = index;
    this.setPending(message.attachments);
    $("prompt").value = message.text;
    $("composer-state").textContent = "Editing. Esc leaves it as it was.";
    this.fit();
    $("prompt").focus();
  }

  cancelEdit() {
    if (this.editFrom === null) return false;
    this.editFrom = null;
    $("prompt").value = "";
    $("composer-state").textContent = "";
    this.setPending([]);
    this.fit();
    return true;
  }

  /** A question goes with what answers it, an answer alone with its tools' results. */
  async remove(index) {
    this.stop();
    this.cancelEdit();
    const { messages } = this.chat;
    const isQuestion = messages[index].role === "user";
    let end = index + 1;
    while (end < messages.length && messages[end].role !== "user" && (isQuestion || messages[end].role === "tool")) end++;
    messages.splice(index, end - index);
    this.drawMessages();
    if (messages.length) await this.keep();
    else await this.deleteChat(this.chat);
  }

  async regenerate(index) {
    this.cancelEdit();
    this.truncate(index);
    await this.answer();
  }

  async answerCalls(message, results) {
    message.isAnswered = true;
    this.drawMessages();
    message.calls.forEach((call, i) => this.append(toolMessage(call, results[i])));
    await this.answer();
  }

  async send() {
    const text = $("prompt").value.trim();
    if (this.running || (!text && !this.pending.length)) return;
    if (this.editFrom !== null) {
      const from = this.editFrom;
      const { pending } = this;
      this.cancelEdit();
      this.pending = pending;
      this.truncate(from);
    }
    this.append(userMessage(text, this.pending));
    $("prompt").value = "";
    this.setPending([]);
    this.fit();
    await this.answer();
  }

  stop() {
    this.running?.abort();
  }

  /** Let the model go on from the messages there are. */
  async answer() {
    const { chat } = this;
    const messages = requestMessages(chat.messages, this.settings.system);
    const options = { stream: true, stream_options: { include_usage: true }, return_token_origins: true };
    const message = emptyAnswer();
    const view = this.append(message);
    const reception = new Reception(message);
    const running = (this.running = new AbortController());
    this.setRunning(true);
    this.toEnd();
    await this.keep();
    let frame = null;
    let saved = performance.now();
    const draw = () => {
      frame = null;
      const isAtEnd = this.isAtEnd();
      view.update();
      if (isAtEnd) this.toEnd();
    };
    try {
      for await (const chunk of streamChat({ ...this.settings.request(), ...options, messages }, this.settings.key, running.signal)) {
        reception.add(chunk);
        frame ??= requestAnimationFrame(draw);
        if (performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          this.store.put(chat).catch(() => {}); // said when the answer is complete
        }
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else {
        message.error = error.message;
        if (error.status === 401) this.settings.askForKey();
        if (error.status === 0 || error.status === 503) this.connect();
        if (!(error instanceof ApiError)) console.error(error);
      }
    } finally {
      cancelAnimationFrame(frame);
      reception.close();
      if (this.running === running) {
        this.running = null;
        this.setRunning(false);
      }
      if (this.chat === chat) {
        draw();
        await this.keep();
      } else await this.store.put(chat).catch(() => {});
    }
  }

  setRunning(isRunning) {
    $("send").hidden = isRunning;
    $("stop").hidden = !isRunning;
  }

  // ------------------------------------------------------------ composer

  setPending(items) {
    this.pending = items;
    const views = items.map((item) => attachmentView(item, () => this.setPending(this.pending.filter((other) => other !== item))));
    $("attachments").replaceChildren(...views);
    $("attachments").hidden = items.length === 0;
  }

  async attach(files) {
    for (const file of files) {
      try {
        this.setPending([...this.pending, await attachment(file, this.modalities)]);
        this.notify("");
      } catch (error) {
        this.notify(error.message);
      }
    }
  }

  /** As high as its text, up to a limit that the stylesheet sets. */
  fit() {
    const area = $("prompt");
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  }

  // ------------------------------------------------------------ scrolling and views

  isAtEnd() {
    const area = $("scroller");
    return area.scrollHeight - area.scrollTop - area.clientHeight < NEAR_END_PX;
  }

  toEnd() {
    $("scroller").scrollTop = $("scroller").scrollHeight;
  }

  /** The button that leads to the end is there where the end is not. */
  markEnd() {
    $("to-end").hidden = this.isAtEnd();
  }

  showView(name) {
    const isAtEnd = this.isAtEnd();
    document.body.dataset.view = name;
    if (isAtEnd) this.toEnd();
    $("view-text").setAttribute("aria-pressed", String(name === "text"));
    $("view-tokens").setAttribute("aria-pressed", String(name === "tokens"));
    save(localStorage, "view", name);
  }

  openSidebar(isOpen) {
    document.body.classList.toggle("sidebar-open", isOpen);
    $("backdrop").hidden = !isOpen;
    $("open-sidebar").setAttribute("aria-expanded", String(isOpen));
    $("sidebar").inert = isPhone.matches && !isOpen;
  }

  listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("input", () => this.fit());
    $("prompt").addEventListener("keydown", (event) => {
      // Enter that ends the composition of a character sends nothing; on a phone it is a new line.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || isPhone.matches) return;
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.attach([...event.clipboardData.files]);
    });
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      this.attach([...event.dataTransfer.files]);
    });
    for (const kind of ["image", "audio"]) {
      const files = $(`${kind}-files`);
      $(`attach-${kind}`).addEventListener("click", () => files.click());
      files.addEventListener("change", async () => {
        await this.attach([...files.files]);
        files.value = "";
      });
    }
    $("stop").addEventListener("click", () => this.stop());
    $("new-chat").addEventListener("click", () => this.show(newChat()));
    $("open-sidebar").addEventListener("click", () => this.openSidebar(!document.body.classList.contains("sidebar-open")));
    $("backdrop").addEventListener("click", () => this.openSidebar(false));
    isPhone.addEventListener("change", () => this.openSidebar(false));
    $("open-settings").addEventListener("click", () => this.settings.open());
    $("delete-all").addEventListener("click", () => this.deleteAll());
    $("view-text").addEventListener("click", () => this.showView("text"));
    $("view-tokens").addEventListener("click", () => this.showView("tokens"));
    $("to-end").addEventListener("click", () => this.toEnd());
    $("scroller").addEventListener("scroll", () => this.markEnd(), { passive: true });
    // A window or a content that changes its size makes no scroll event.
    const sizes = new ResizeObserver(() => this.markEnd());
    sizes.observe($("scroller"));
    sizes.observe($("messages"));
    addEventListener("keydown", (event) => this.shortcut(event));
    $("starters").replaceChildren(
      ...STARTERS.map((text) => {
        const onclick = () => {
          $("prompt").value = text;
          this.send();
        };
        return el("button", { type: "button", onclick }, text);
      }),
    );
  }

  shortcut(event) {
    if ($("settings").open) return;
    const isWriting = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName);
    if (event.key === "Escape") {
      if (this.running) this.stop();
      else if (!this.cancelEdit()) this.openSidebar(false);
    } else if (event.altKey && event.code === "KeyN") this.show(newChat());
    else if (event.altKey && event.code === "KeyT") this.showView(document.body.dataset.view === "tokens" ? "text" : "tokens");
    else if (event.altKey && event.code === "Comma") this.settings.open();
    else if (event.key === "/" && !isWriting) $("prompt").focus();
    else return;
    event.preventDefault();
  }
}

new Page().start();
