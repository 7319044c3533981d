// One request for one turn: reads the stream, fetches pictures, notices silence.

import { count } from "./document.js";
import { fromBase64, sizeOf } from "./pictures.js";
import { requestBody } from "./request.js";
import { pictureAt, readiness, respond, ServerError } from "./server.js";
import { Turn } from "./turn.js";

export class Run {
  // about: {model, parts, before, turn (settings with id), changed(), silent(seconds | null)}
  constructor(about) {
    Object.assign(this, about);
    this.state = new Turn(this.parts, this.turn.id, this.before);
    this.controller = new AbortController();
    this.requestId = `page-${this.turn.id}`;
    this.started = performance.now();
    this.lastSign = this.started;
    this.stopped = false;
    this.others = null; // documents at the server while this one waits
  }

  stop() {
    this.stopped = true;
    this.controller.abort();
  }

  // Null, or the error that ended the turn. What has come until then stays in the parts.
  async go() {
    const watch = setInterval(() => this.listen(), 1000);
    const fetching = [];
    let failure = null;
    try {
      const body = await requestBody(this.model, [...this.before, ...this.parts], this.turn);
      const { signal } = this.controller;
      const onSign = () => {
        this.lastSign = performance.now();
        this.silent(null);
      };
      for await (const event of respond(body, { signal, requestId: this.requestId, onSign })) {
        const whole = this.state.apply(event);
        if (whole) fetching.push(this.fetch(whole, signal));
        this.changed();
        if (this.state.ended) break;
      }
      await Promise.all(fetching);
      if (this.state.error) {
        const { code, message } = this.state.error;
        throw new ServerError(200, code ?? "", message ?? "", { requestId: this.requestId });
      }
      if (!this.state.ended) throw new ServerError(0, "lost", "", { requestId: this.requestId });
    } catch (error) {
      if (!this.stopped) failure = error;
      if (!(error instanceof ServerError) && error.name !== "AbortError") console.error(error);
    } finally {
      clearInterval(watch);
      await Promise.allSettled(fetching); // pictures that are whole are kept
      this.silent(null);
      this.state.stop();
      this.turn.seconds = (performance.now() - this.started) / 1000;
    }
    return failure;
  }

  async fetch({ part, source }, signal) {
    const blob = source.url ? await pictureAt(source.url, this.stopped ? undefined : signal)
      : fromBase64(source.base64, source.type);
    const { width, height } = await sizeOf(blob);
    this.state.finish(part, blob, width, height);
    this.changed(part);
  }

  listen() {
    const seconds = Math.round((performance.now() - this.lastSign) / 1000);
    if (this.keepAlive && seconds >= 2 * this.keepAlive) this.silent(seconds);
    if (!this.state.items.size && seconds % 3 === 2) {
      readiness().then(({ documents }) => { this.others = documents; });
    }
    this.changed();
  }

  // Words and pictures that this turn made.
  made() {
    return count([...this.state.items.values()]);
  }
}
