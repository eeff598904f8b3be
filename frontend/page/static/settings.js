// The settings dialog: what it holds, what of it goes into a request, and where it is kept.

import { el } from "./dom.js";
import { load, save } from "./store.js";

const NUMBERS = [
  "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
  "thinking_budget",
]; // prettier-ignore
const TEXTS = ["model", "system", "stop", "thinking", "tools", "theme"];

/**
 * The form's values. `onKey` is called when the API key was changed, `onModel` when another model was chosen.
 *
 * The key is kept for the tab alone unless its owner ticks the box; all else stays in this browser.
 */
export class Settings {
  constructor(dialog, onKey, onModel) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    const kept = load(localStorage, "settings", {});
    for (const name of [...NUMBERS, ...TEXTS]) {
      if (kept[name] !== undefined && name !== "model") this.#field(name).value = kept[name];
    }
    const lasting = load(localStorage, "key", "");
    this.#field("api_key").value = lasting || load(sessionStorage, "key", "");
    this.#field("remember_key").checked = lasting !== "";
    this.form.addEventListener("input", (event) => this.#changed(event.target));
    this.form.addEventListener("change", (event) => {
      if (event.target.name === "api_key") onKey();
      if (event.target.name === "model") onModel();
    });
    // Enter in a field would press the dialog's first button, which closes it.
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.tagName === "INPUT") {
        event.preventDefault();
        event.target.blur();
      }
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside the form
    });
    this.#checkTools();
  }

  #field(name) {
    return this.form.elements.namedItem(name);
  }

  #text(name) {
    return this.#field(name).value.trim();
  }

  #changed(field) {
    if (field.name === "api_key" || field.name === "remember_key") {
      const isLasting = this.#field("remember_key").checked;
      save(localStorage, "key", isLasting && this.key ? this.key : undefined);
      save(sessionStorage, "key", !isLasting && this.key ? this.key : undefined);
      return;
    }
    const kept = {};
    for (const name of [...NUMBERS, ...TEXTS]) {
      if (this.#field(name).value !== "") kept[name] = this.#field(name).value;
    }
    save(localStorage, "settings", kept);
    if (field.name === "theme") this.applyTheme();
    if (field.name === "tools") this.#checkTools();
  }

  open() {
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** Where a key is missing: the dialog at its field. */
  askForKey() {
    this.open();
    this.#field("api_key").focus();
  }

  get model() {
    return this.#text("model");
  }

  get key() {
    return this.#text("api_key");
  }

  applyTheme() {
    const theme = this.#text("theme");
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }

  /** Show what is served: the model, and its adapters. The one chosen last stays chosen while it is there. */
  setModels(cards) {
    const field = this.#field("model");
    const wanted = field.value || load(localStorage, "settings", {}).model;
    field.replaceChildren(...cards.map((card) => el("option", { value: card.id }, card.id)));
    if (cards.some((card) => card.id === wanted)) field.value = wanted;
    const [card] = cards;
    const facts = [
      ["Context", card.max_model_len ? `${card.max_model_len.toLocaleString("en")} tokens` : "not known yet"],
      ["Takes", card.input_modalities.join(", ")],
    ];
    const rows = facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
    this.dialog.querySelector("#model-facts").replaceChildren(...rows);
  }

  /** The tools, or null; throws where the text is no list. */
  #tools() {
    const text = this.#text("tools");
    if (!text) return null;
    const tools = JSON.parse(text);
    if (!Array.isArray(tools)) throw new SyntaxError("expected a list: [ … ]");
    return tools.length ? tools : null;
  }

  #checkTools() {
    const place = this.dialog.querySelector("#tools-error");
    place.hidden = true;
    try {
      this.#tools();
    } catch (error) {
      place.textContent = `Not used: ${error.message}`;
      place.hidden = false;
    }
  }

  get system() {
    return this.#text("system");
  }

  /** Members of a request. Empty fields are left out, so that the model's own defaults hold. */
  request() {
    const body = { model: this.#text("model") || "default" };
    for (const name of NUMBERS) {
      const field = this.#field(name);
      if (field.value !== "" && !field.validity.badInput) body[name] = field.valueAsNumber;
    }
    if (this.#field("stop").value) body.stop = this.#field("stop").value;
    if (this.#text("thinking")) body.enable_thinking = this.#text("thinking") === "on";
    try {
      const tools = this.#tools();
      if (tools) body.tools = tools;
    } catch {
      // The dialog says so.
    }
    return body;
  }
}
