// What the browser keeps. Chats lie in IndexedDB (their images are too large for localStorage), settings in localStorage.

const DATABASE = "tandem";
const CHATS = "chats";

/** The chats of this browser; kept in memory alone where it allows no storage (a private window, say). */
export class ChatStore {
  #database = null;
  #memory = new Map();

  async open() {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(CHATS, { keyPath: "id" });
      this.#database = await result(request);
    } catch {
      this.#database = null;
    }
    return this;
  }

  get isLasting() {
    return this.#database !== null;
  }

  #objects(mode) {
    return this.#database.transaction(CHATS, mode).objectStore(CHATS);
  }

  /** All chats, the one used last first. */
  async all() {
    const chats = this.isLasting ? await result(this.#objects("readonly").getAll()) : [...this.#memory.values()];
    return chats.sort((a, b) => b.updated - a.updated);
  }

  async put(chat) {
    const copy = structuredClone(chat);
    if (this.isLasting) await result(this.#objects("readwrite").put(copy));
    else this.#memory.set(chat.id, copy);
  }

  async delete(id) {
    if (this.isLasting) await result(this.#objects("readwrite").delete(id));
    else this.#memory.delete(id);
  }

  async clear() {
    if (this.isLasting) await result(this.#objects("readwrite").clear());
    else this.#memory.clear();
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version of the chats"));
  });
}

/** A JSON value in localStorage or sessionStorage; `fallback` where there is none or it cannot be read. */
export function load(storage, name, fallback) {
  try {
    return JSON.parse(storage.getItem(`tandem.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Keep a JSON value, or forget it with `undefined`. A full or forbidden storage is no reason to stop. */
export function save(storage, name, value) {
  try {
    if (value === undefined) storage.removeItem(`tandem.${name}`);
    else storage.setItem(`tandem.${name}`, JSON.stringify(value));
  } catch {
    // The value lives as long as the page does.
  }
}
