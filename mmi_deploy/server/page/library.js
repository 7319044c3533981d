// The documents of this browser: the one that is open, its versions, and saving.

import { isEmpty, newDocument } from "./document.js";

const LAST = "mmi-last";
const SAVE_AFTER = 400; // milliseconds without a change

export class Library {
  constructor(store, failed) {
    this.store = store;
    this.failed = failed; // called when the browser does not keep a document
    this.document = null;
    this.timer = 0;
    this.release = () => {};
  }

  // The document that was open last, unless another tab has it open: then a new one.
  async start() {
    const id = sessionStorage.getItem(LAST) ?? localStorage.getItem(LAST);
    const last = id ? await this.store.get(id) : null;
    if (last && await this.claim(last.id)) this.use(last);
    else await this.create();
  }

  async create(more = {}) {
    const document = newDocument(more);
    await this.claim(document.id);
    this.use(document);
  }

  // False if another tab has it open.
  async open(id) {
    await this.save();
    if (id === this.document.id) return true;
    const document = await this.store.get(id);
    if (!document || !await this.claim(id)) return false;
    this.use(document);
    return true;
  }

  use(document) {
    for (const part of [...document.parts, ...(document.takes ?? []).flatMap((take) => take.parts)]) {
      if (part.state === "drawing") part.state = "stopped"; // the page was closed in between
    }
    for (const turn of Object.values(document.turns)) turn.running = false;
    this.document = document;
    sessionStorage.setItem(LAST, document.id);
    localStorage.setItem(LAST, document.id);
  }

  changed() {
    this.document.updated = Date.now();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), SAVE_AFTER);
  }

  async save(document = this.document) {
    clearTimeout(this.timer);
    if (!document || isEmpty(document) && !await this.store.get(document.id)) return;
    try {
      await this.store.put(document);
    } catch (error) {
      this.failed(error);
    }
  }

  // A version of the open document with other parts, kept beside it.
  async fork(parts, more = {}) {
    const { family, title, turns } = this.document;
    const versions = await this.versions();
    const version = Math.max(this.document.version, ...versions.map((one) => one.version)) + 1;
    return newDocument({ family, title, turns: { ...turns }, parts, version, updated: Date.now(), ...more });
  }

  async switchTo(document) {
    await this.save();
    await this.claim(document.id);
    this.use(document);
    await this.save();
  }

  async versions() {
    const all = await this.store.all();
    return all.filter((one) => one.family === this.document.family)
      .sort((a, b) => a.version - b.version);
  }

  // One tab writes a document. Without locks (not a secure context) every tab may.
  async claim(id) {
    if (!navigator.locks) return true;
    for (let tries = 0; tries < 3; tries += 1) { // a tab that reloads gives its lock back soon
      const release = await new Promise((resolve) => {
        navigator.locks.request(`mmi-${id}`, { ifAvailable: true }, (lock) => {
          if (!lock) return resolve(null);
          return new Promise((done) => resolve(done));
        });
      });
      if (release) {
        this.release();
        this.release = release;
        return true;
      }
      await new Promise((done) => setTimeout(done, 100));
    }
    return false;
  }
}
