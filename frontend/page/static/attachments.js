// Images and clips on their way into a message: data URLs, as the API takes them.

import { el, iconButton } from "./dom.js";

const MAX_BYTES = 20 * 1024 * 1024; // what the server takes of one item
const IMAGE_TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"]);
const AUDIO_FORMATS = new Set(["wav", "mp3", "flac", "ogg", "m4a"]);

/**
 * A file as an attachment.
 *
 * Throws an Error with words for people where the model or the API does not take it.
 */
export async function attachment(file, modalities) {
  const format = file.name.split(".").at(-1).toLowerCase();
  const isImage = IMAGE_TYPES.has(file.type);
  const isAudio = !isImage && (AUDIO_FORMATS.has(format) || file.type.startsWith("audio/"));
  if (!isImage && !isAudio) throw new Error(`${file.name}: not an image or clip that the server reads.`);
  if (isAudio && !AUDIO_FORMATS.has(format)) throw new Error(`${file.name}: audio has to be ${[...AUDIO_FORMATS].join(", ")}.`);
  const kind = isImage ? "image" : "audio";
  if (!modalities.includes(kind)) throw new Error(`${file.name}: this model takes no ${isImage ? "images" : "audio"}.`);
  if (file.size > MAX_BYTES) throw new Error(`${file.name}: larger than 20 MiB.`);
  return { kind, format, name: file.name, url: await dataUrl(file) };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** The content part of a request. */
export function contentPart(item) {
  if (item.kind === "image") return { type: "image_url", image_url: { url: item.url } };
  const data = item.url.slice(item.url.indexOf(",") + 1);
  return { type: "input_audio", input_audio: { data, format: item.format } };
}

/** How a message or the composer shows it; with `onRemove` it can be taken out again. */
export function attachmentView(item, onRemove) {
  const media =
    item.kind === "image"
      ? el("img", { src: item.url, alt: item.name })
      : el("audio", { src: item.url, controls: true, preload: "metadata", title: item.name });
  const remove = onRemove && iconButton("close", `Remove ${item.name}`, onRemove);
  return el("figure", { class: `attachment ${item.kind}` }, media, remove);
}
