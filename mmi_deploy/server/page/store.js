// Documents kept in this browser (IndexedDB), with their pictures.

const NAME = "mmi";
const DOCUMENTS = "documents";

export class Store {
  // A store that keeps nothing where the browser does not allow it: `works` is false then.
  static async open() {
    try {
      return new Store(await promise(opening()));
    } catch {
      return new Store(null);
    }
  }

  constructor(database) {
    this.database = database;
  }

  get works() {
    return this.database !== null;
  }

  async all() {
    if (!this.works) return [];
    const documents = await promise(this.in("readonly").getAll());
    return documents.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.works ? (await promise(this.in("readonly").get(id))) ?? null : null;
  }

  async put(document) {
    if (this.works) await promise(this.in("readwrite").put(document));
  }

  async delete(id) {
    if (this.works) await promise(this.in("readwrite").delete(id));
  }

  in(mode) {
    return this.database.transaction(DOCUMENTS, mode).objectStore(DOCUMENTS);
  }
}

function opening() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(DOCUMENTS, { keyPath: "id" });
  return request;
}

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
