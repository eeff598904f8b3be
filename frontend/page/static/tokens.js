// Where tokens came from: the view that colours them, and what they add up to.

import { el } from "./dom.js";

const NAMES = {
  target: "Target",
  ngram: "n-gram",
  suffix: "Recent outputs",
  model: "Draft model",
  eagle3: "EAGLE-3",
  dflash: "DFlash",
  mtp: "MTP",
  unknown: "Unknown",
};
const CLASSES = new Set(Object.keys(NAMES));

const nameOf = (origin) => NAMES[origin] ?? origin;
const classOf = (origin) => `o-${CLASSES.has(origin) ? origin : "model"}`;

/** A token's text as it can be seen: a line break has a sign before it, a token without text a dot. */
function shown(text) {
  return text === "" ? "·" : text.replaceAll("\n", "↵\n");
}

/**
 * Colour `origins`, a list of [text, origin]. Tokens that are there already stay; called again with more it adds those.
 */
export function renderTokens(container, origins) {
  if (container.firstChild === null || container.numTokens > origins.length) {
    container.replaceChildren(el("div", { class: "legend" }), el("div", { class: "tokens" }));
    container.numTokens = 0;
  }
  const [legend, flow] = container.children;
  for (; container.numTokens < origins.length; container.numTokens++) {
    const [text, origin] = origins[container.numTokens];
    const title = `${nameOf(origin)}, token ${container.numTokens + 1}`;
    flow.append(el("span", { class: `token ${classOf(origin)}${text ? "" : " empty"}`, title }, shown(text)));
  }
  renderLegend(legend, origins);
}

function renderLegend(legend, origins) {
  const counts = new Map([["target", 0]]);
  for (const [, origin] of origins) counts.set(origin, (counts.get(origin) ?? 0) + 1);
  const rows = [...counts].map(([origin, count]) => {
    const share = origins.length ? Math.round((100 * count) / origins.length) : 0;
    return el(
      "span",
      { class: "legend-entry" },
      el("span", { class: `swatch ${classOf(origin)}` }),
      `${nameOf(origin)} `,
      el("b", {}, String(count)),
      ` ${share}%`,
    );
  });
  legend.replaceChildren(...rows);
}

/** Counts and times of an answer while it comes; `stats` is what is kept of it. */
export class Meter {
  constructor() {
    this.started = performance.now();
    this.firstToken = null;
    this.stats = { tokens: 0, drafted: 0, accepted: 0, ttft: null, rate: null, cached: null, queue: null };
  }

  /** Take in one chunk's `tandem` member. */
  add(told) {
    const now = performance.now();
    if (told.origins.length && this.firstToken === null) {
      this.firstToken = now;
      this.stats.ttft = (now - this.started) / 1000;
    }
    this.stats.tokens += told.origins.length;
    this.stats.drafted = told.draft_n;
    this.stats.accepted = told.draft_n_accepted;
    // The first chunk's tokens came when the clock started, so they are not part of the rate.
    this.numFirst ??= this.stats.tokens;
    const seconds = (now - this.firstToken) / 1000;
    if (seconds > 0.05) this.stats.rate = (this.stats.tokens - this.numFirst) / seconds;
  }

  /** The server's own figures, which come with the last chunk. */
  end(timings) {
    this.stats.rate = timings.predicted_per_second || this.stats.rate;
    this.stats.cached = timings.cache_n;
    this.stats.prompt = timings.prompt_n + timings.cache_n;
    this.stats.queue = timings.queue_ms / 1000;
    this.stats.drafted = timings.draft_n;
    this.stats.accepted = timings.draft_n_accepted;
  }
}

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

/** The line under an answer. */
export function renderStats(container, stats) {
  const parts = [];
  const add = (name, value, title) => parts.push(el("span", { title }, el("b", {}, value), ` ${name}`));
  if (stats.rate) add("tokens/s", stats.rate.toFixed(stats.rate < 10 ? 1 : 0), "While it was decoded");
  add(stats.tokens === 1 ? "token" : "tokens", String(stats.tokens), "Of the answer, reasoning and calls included");
  if (stats.drafted) {
    const share = Math.round((100 * stats.accepted) / stats.drafted);
    add("accepted", `${share}%`, `${stats.accepted} of ${stats.drafted} drafted tokens`);
  }
  if (stats.ttft !== null) add("to first token", seconds(stats.ttft), "As this page saw it");
  if (stats.cached) add("cached", String(stats.cached), `Of ${stats.prompt} prompt tokens`);
  container.replaceChildren(...parts);
}
