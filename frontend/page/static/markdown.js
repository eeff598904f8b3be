// Markdown as models write it, straight to elements: headings, lists, tables, quotes, code, emphasis, links.
//
// A subset of CommonMark and GFM. HTML in the text stays text, images are not loaded (a link to an outside picture would
// tell its host that somebody reads this), and links go to http, https and mailto only.

import { copyButton, el } from "./dom.js";

const MAX_DEPTH = 12; // of quotes and lists in each other; what is deeper is shown as plain paragraphs
const MAX_INLINE = 10_000; // characters of one paragraph that are looked through for emphasis and links
const MAX_LINK = 2000; // characters of a link's words, and of its address

/**
 * Show `text` in `container`. Called again with more text it keeps the elements of blocks that are the same as before,
 * so a long answer that streams costs its last block, and a selection in an earlier one stays.
 */
export function render(container, text) {
  const sources = splitBlocks(text);
  const before = container.markdownSources ?? [];
  let same = 0;
  while (same < sources.length && same < before.length && sources[same] === before[same]) same++;
  const nodes = container.markdownNodes ?? [];
  for (const node of nodes.splice(same)) node.remove();
  for (const source of sources.slice(same)) {
    const block = blocks(source.split("\n"), 0);
    const node = block.length === 1 ? block[0] : el("div", {}, block);
    nodes.push(node);
    container.append(node);
  }
  container.markdownSources = sources;
  container.markdownNodes = nodes;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** Pieces of the text that can be rendered on their own: cut at empty lines outside fences, before unindented lines. */
function splitBlocks(text) {
  const pieces = [];
  let piece = [];
  let fence = null;
  let isBlank = false;
  for (const line of text.replaceAll("\r\n", "\n").split("\n")) {
    const mark = FENCE.exec(line);
    if (fence === null && isBlank && line.trim() && !/^ {2,}|^\t/.test(line) && !isItemBeside(piece, line)) {
      pieces.push(piece.join("\n"));
      piece = [];
    }
    if (mark && fence === null) fence = mark[1];
    else if (mark && fence !== null && closes(mark, fence)) fence = null;
    isBlank = !line.trim();
    piece.push(line);
  }
  if (piece.some((line) => line.trim())) pieces.push(piece.join("\n"));
  return pieces;
}

/** Items with empty lines between them are one list. */
function isItemBeside(piece, line) {
  const first = piece.find((other) => other.trim());
  return first !== undefined && ITEM.test(first) && ITEM.test(line);
}

function closes(mark, fence) {
  return mark[1][0] === fence[0] && mark[1].length >= fence.length && !mark[2].trim();
}

/** Elements for these lines. */
function blocks(lines, depth) {
  const out = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) out.push(el("p", {}, inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      flush();
      i++;
    } else if ((match = FENCE.exec(line))) {
      flush();
      const end = fenceEnd(lines, i, match[1]);
      out.push(codeBlock(lines.slice(i + 1, end), match[2].trim()));
      i = end + 1;
    } else if ((match = HEADING.exec(line))) {
      flush();
      // The page has its own h1 and h2; a model's headings are parts of one message.
      out.push(el(`h${Math.min(6, match[1].length + 2)}`, {}, inline(match[2] ?? "")));
      i++;
    } else if (RULE.test(line) && !(paragraph.length && /^ {0,3}-+\s*$/.test(line))) {
      flush();
      out.push(el("hr"));
      i++;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      flush();
      let end = i;
      while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !startsBlock(lines[end])))) end++;
      out.push(el("blockquote", {}, blocks(lines.slice(i, end).map((other) => other.replace(QUOTE, "")), depth + 1)));
      i = end;
    } else if (depth < MAX_DEPTH && ITEM.test(line)) {
      flush();
      const end = listEnd(lines, i);
      out.push(list(lines.slice(i, end), depth + 1));
      i = end;
    } else if (line.includes("|") && i + 1 < lines.length && isTable(line, lines[i + 1])) {
      flush();
      let end = i + 2;
      while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
      out.push(table(lines.slice(i, end)));
      i = end;
    } else {
      paragraph.push(line);
      i++;
    }
  }
  flush();
  return out;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line);
}

/** Index of the closing fence; the number of lines where it is still to come. */
function fenceEnd(lines, start, fence) {
  for (let i = start + 1; i < lines.length; i++) {
    const mark = FENCE.exec(lines[i]);
    if (mark && closes(mark, fence)) return i;
  }
  return lines.length;
}

function codeBlock(lines, info) {
  const language = info.split(/\s/)[0];
  const text = lines.join("\n");
  const head = el("div", { class: "code-head" }, el("span", {}, language || "text"), copyButton("Copy code", () => text));
  return el("div", { class: "code-block" }, head, el("pre", { tabIndex: 0 }, el("code", {}, text)));
}

const indentOf = (line) => line.length - line.trimStart().length;

/** Where a list that begins at `start` ends: at a line that is neither indented, nor an item, nor a paragraph's rest. */
function listEnd(lines, start) {
  const base = indentOf(lines[start]);
  let isBlank = false;
  let i = start + 1;
  for (; i < lines.length; i++) {
    const line = lines[i];
    if (!line.trim()) isBlank = true;
    else if (ITEM.test(line) && !RULE.test(line)) isBlank = false;
    else if (indentOf(line) > base) isBlank = false;
    else if (isBlank || startsBlock(line) || QUOTE.test(line)) break;
  }
  while (i > start + 1 && !lines[i - 1].trim()) i--;
  return i;
}

function list(lines, depth) {
  const [, spaces, mark] = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= spaces.length + 1) {
      items.push({ width: match[0].length, lines: [line.slice(match[0].length)] });
    } else {
      const item = items.at(-1);
      item.lines.push(line.slice(Math.min(indentOf(line), item.width)));
    }
  }
  const isLoose = lines.some((line, i) => !line.trim() && i < lines.length - 1);
  const rows = items.map((item) => {
    const content = blocks(item.lines, depth);
    // A tight list's items are lines, not paragraphs.
    if (!isLoose && content[0]?.tagName === "P") content.splice(0, 1, ...content[0].childNodes);
    return el("li", {}, content);
  });
  if (!isOrdered) return el("ul", {}, rows);
  const first = parseInt(mark, 10);
  return el("ol", first === 1 ? {} : { start: first }, rows);
}

function cells(line) {
  const parts = [];
  let cell = "";
  const body = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  for (let i = 0; i < body.length; i++) {
    if (body[i] === "\\" && body[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (body[i] === "|") {
      parts.push(cell.trim());
      cell = "";
    } else cell += body[i];
  }
  return [...parts, cell.trim()];
}

function isTable(head, line) {
  return TABLE_LINE.test(line) && line.includes("-") && cells(head).length === cells(line).length;
}

function table(lines) {
  const aligns = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, tag) => {
    const parts = cells(line);
    return el("tr", {}, aligns.map((align, i) => el(tag, { class: `align-${align}` }, inline(parts[i] ?? ""))));
  };
  const body = el("tbody", {}, lines.slice(2).map((line) => row(line, "td")));
  return el("div", { class: "table", tabIndex: 0 }, el("table", {}, el("thead", {}, row(lines[0], "th")), body));
}

// ------------------------------------------------------------------ inside a paragraph

const SPECIAL = /[\\`*_~[!\n]|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const TARGET = /^\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;

/** Nodes for a paragraph's text. */
function inline(text, depth = 0) {
  if (text.length > MAX_INLINE || depth > MAX_DEPTH) return [text];
  const out = [];
  let plain = "";
  const add = (node) => {
    if (plain) out.push(plain);
    plain = "";
    out.push(node);
  };
  const special = new RegExp(SPECIAL);
  let i = 0;
  while (i < text.length) {
    special.lastIndex = i;
    const match = special.exec(text);
    if (match === null) break;
    plain += text.slice(i, match.index);
    i = match.index;
    const found = span(text, i, depth);
    if (found === null) {
      plain += text[i];
      i++;
    } else {
      if (typeof found.node === "string") plain += found.node;
      else add(found.node);
      i = found.end;
    }
  }
  plain += text.slice(i);
  if (plain) out.push(plain);
  return out;
}

/** What begins at `i`: its node (or text) and where it ends; null where the character means itself. */
function span(text, i, depth) {
  const character = text[i];
  switch (character) {
    case "\n":
      return { node: el("br"), end: i + 1 };
    case "\\":
      return PUNCTUATION.test(text[i + 1] ?? "") ? { node: text[i + 1], end: i + 2 } : null;
    case "`":
      return codeSpan(text, i);
    case "!":
      return text[i + 1] === "[" ? link(text, i + 1, depth, true) : null;
    case "[":
      return link(text, i, depth, false);
    case "*":
    case "_":
    case "~":
      return emphasis(text, i, depth);
    default:
      return address(text, i);
  }
}

function codeSpan(text, i) {
  const ticks = /^`+/.exec(text.slice(i, i + 64))[0];
  let end = text.indexOf(ticks, i + ticks.length);
  while (end >= 0 && (text[end + ticks.length] === "`" || text[end - 1] === "`")) {
    while (text[end] === "`") end++;
    end = text.indexOf(ticks, end);
  }
  if (end < 0) return { node: ticks, end: i + ticks.length };
  const code = text.slice(i + ticks.length, end).replaceAll("\n", " ");
  const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
  return { node: el("code", {}, isPadded ? code.slice(1, -1) : code), end: end + ticks.length };
}

function emphasis(text, i, depth) {
  const mark = text[i];
  let width = 1;
  while (text[i + width] === mark && width < 3) width++;
  if (mark === "~" && width !== 2) return { node: text.slice(i, i + width), end: i + width };
  const before = text[i - 1] ?? " ";
  const after = text[i + width] ?? " ";
  // An underscore inside a word is a part of it: snake_case.
  if (/\s/.test(after) || (mark === "_" && WORD.test(before))) return { node: text.slice(i, i + width), end: i + width };
  for (let end = text.indexOf(mark.repeat(width), i + width); end >= 0; end = text.indexOf(mark.repeat(width), end + 1)) {
    let run = end;
    while (text[run] === mark) run++;
    const isEnd = !/\s/.test(text[end - 1]) && text[end - 1] !== "\\" && !(mark === "_" && WORD.test(text[run] ?? " "));
    if (isEnd && (run - end === width || run - end === 3)) {
      const close = run - width; // of "***" the last marks are ours, the first those of what is inside
      const content = inline(text.slice(i + width, close), depth + 1);
      if (mark === "~") return { node: el("del", {}, content), end: run };
      if (width === 1) return { node: el("em", {}, content), end: run };
      const strong = el("strong", {}, content);
      return { node: width === 3 ? el("em", {}, strong) : strong, end: run };
    }
    end = run - 1;
  }
  return { node: text.slice(i, i + width), end: i + width };
}

/** [text](address), or the words of an image. */
function link(text, i, depth, isImage) {
  let level = 0;
  let end = i;
  for (const last = Math.min(text.length, i + MAX_LINK); end < last; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") level++;
    else if (text[end] === "]" && --level === 0) break;
  }
  const target = text[end + 1] === "(" ? TARGET.exec(text.slice(end + 1, end + MAX_LINK)) : null;
  const href = target && safeAddress(target[1]);
  if (!href) return null;
  const words = text.slice(i + 1, end);
  const content = isImage ? [`Image: ${words || href}`] : inline(words, depth + 1);
  return { node: anchor(href, content), end: end + 1 + target[0].length };
}

function address(text, i) {
  const found = /^https?:\/\/[^\s<>"'`|]+/.exec(text.slice(i, i + MAX_LINK));
  if (found === null) return null;
  let url = found[0].replace(/[.,:;!?*_~]+$/, "");
  if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
  const href = safeAddress(url);
  return href ? { node: anchor(href, [url]), end: i + url.length } : null;
}

function safeAddress(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative ones would lead into this server
  }
}

function anchor(href, content) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}
