// Elements without markup: text only ever becomes a text node, so nothing a model writes can become an element.

/**
 * An element with properties and children.
 *
 * `properties`: `class`, `dataset`, `on…` listeners, `aria-…` and other attributes with a dash, else DOM properties.
 * Children are nodes or strings; null and undefined are left out.
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the page's own icons. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A small button with an icon. */
export function iconButton(name, label, onclick) {
  return el("button", { class: "icon-button", type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

/** A button that copies what `text()` gives and says so by its icon. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    button.firstChild.replaceWith(icon((await copy(text())) ? "check" : "close"));
    setTimeout(() => button.firstChild.replaceWith(icon("copy")), 1200);
  });
  return button;
}

/** Whether it worked. The clipboard API is missing on plain http from another machine: there the old way is used. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { value: text, class: "offscreen" });
    document.body.append(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    return worked;
  }
}
