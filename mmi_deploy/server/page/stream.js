// Server-sent events out of bytes that arrive in any pieces.

export class EventReader {
  constructor() {
    this.decoder = new TextDecoder("utf-8");
    this.rest = "";
    this.name = "";
    this.data = [];
  }

  // Events {name, data} that are complete with these bytes.
  push(bytes) {
    this.rest += this.decoder.decode(bytes, { stream: true });
    const events = [];
    let start = 0;
    for (;;) {
      const end = this.lineEnd(start);
      if (end < 0) break;
      const event = this.line(this.rest.slice(start, end));
      if (event) events.push(event);
      start = this.rest.startsWith("\r\n", end) ? end + 2 : end + 1;
    }
    this.rest = this.rest.slice(start);
    return events;
  }

  // Index of the next line end; -1 if there is none, or if a \n may follow the \r.
  lineEnd(start) {
    const found = this.rest.slice(start).search(/[\r\n]/);
    if (found < 0) return -1;
    const end = start + found;
    return this.rest[end] === "\r" && end + 1 === this.rest.length ? -1 : end;
  }

  line(line) {
    if (line === "") {
      const event = this.data.length ? { name: this.name, data: this.data.join("\n") } : null;
      this.name = "";
      this.data = [];
      return event;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.data.push(value);
    if (field === "event") this.name = value;
    return null; // comments (an empty field) and unknown fields mean nothing
  }
}

// Decoded JSON of each event of a response. `onSign` is called for every piece, comments too.
export async function* jsonEvents(body, onSign = () => {}) {
  const reader = body.getReader();
  const events = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onSign();
      for (const event of events.push(value)) {
        if (event.data !== "[DONE]") yield JSON.parse(event.data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
