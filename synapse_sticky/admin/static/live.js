// SPDX-License-Identifier: AGPL-3.0-or-later
// Asks again and again: at a bounded rate, only while the tab is seen, ever more rarely after
// errors.

const LONGEST_MS = 60_000;
// A busy server is left alone for this many times as long as its answer took.
const REST = 4;

// How long to wait after an answer that took so long, or after so many errors in a row.
export function pauseMs(intervalMs, tookMs, errors, askedForMs = 0) {
  const pause = errors > 0 ? intervalMs * 2 ** errors : Math.max(intervalMs, tookMs * REST);
  return Math.max(Math.min(pause, LONGEST_MS), askedForMs);
}

export class Live {
  #timer = null;
  #running = null;
  #errors = 0;
  #dueAt = 0;
  #paused = false;
  #ended = false;
  #onVisibility = () => this.#schedule();

  // ask(signal) asks and shows. onState({kind, ...}) hears of "live", "failed", "paused".
  constructor(intervalMs, ask, onState) {
    this.intervalMs = intervalMs;
    this.ask = ask;
    this.onState = onState;
    document.addEventListener("visibilitychange", this.#onVisibility);
    this.#schedule();
  }

  get paused() {
    return this.#paused;
  }

  set paused(value) {
    this.#paused = value;
    if (value) this.onState({ kind: "paused" });
    else this.#dueAt = 0;
    this.#schedule();
  }

  // Ask now, also while paused: something was changed.
  async now() {
    this.#running?.abort();
    await this.#step();
  }

  end() {
    this.#ended = true;
    clearTimeout(this.#timer);
    this.#running?.abort();
    document.removeEventListener("visibilitychange", this.#onVisibility);
  }

  #schedule() {
    clearTimeout(this.#timer);
    if (this.#ended || this.#paused || this.#running || document.visibilityState === "hidden") {
      return;
    }
    this.#timer = setTimeout(() => this.#step(), Math.max(0, this.#dueAt - performance.now()));
  }

  async #step() {
    const running = new AbortController();
    this.#running = running;
    const began = performance.now();
    try {
      await this.ask(running.signal);
      if (running.signal.aborted) return;
      this.#errors = 0;
      this.#wait(pauseMs(this.intervalMs, performance.now() - began, 0));
      this.onState(this.#paused ? { kind: "paused" } : { kind: "live" });
    } catch (error) {
      if (running.signal.aborted) return;
      this.#errors += 1;
      const pause = pauseMs(this.intervalMs, 0, this.#errors, error.retryAfterMs ?? 0);
      this.#wait(pause);
      this.onState({ kind: "failed", error, pause });
    } finally {
      if (this.#running === running) this.#running = null;
      this.#schedule();
    }
  }

  #wait(ms) {
    this.#dueAt = performance.now() + ms;
  }
}
