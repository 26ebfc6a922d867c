// SPDX-License-Identifier: AGPL-3.0-or-later
// What every section of the page has: a heading, a place for errors, and a line that says whether
// what is shown is live.

import { serverNow } from "./api.js";
import { alertPlace, button, h, setText } from "./dom.js";
import { Live } from "./live.js";
import { count, moment } from "./words.js";

export class View {
  #clock = null;
  #state;
  #pause;

  constructor(title, ...beside) {
    this.heading = h("h1", { tabindex: "-1" }, title);
    this.alert = alertPlace();
    this.#state = h("span", { class: "live-state", "data-kind": "waiting" }, "Asking the server…");
    this.#pause = button("Pause", () => this.#togglePause(), { class: "quiet" });
    this.element = h(
      "div",
      { class: "view" },
      h(
        "div",
        { class: "view-head" },
        h("div", { class: "view-title" }, this.heading, ...beside),
        h("p", { class: "live-line" }, this.#state, this.#pause),
      ),
      this.alert.element,
    );
  }

  // Asks every few seconds with ask(signal), and lets tick() count the seconds in between.
  start(intervalMs, ask, tick = null) {
    this.live = new Live(intervalMs, ask, (state) => this.#show(state));
    if (tick !== null) {
      this.#clock = setInterval(() => {
        if (document.visibilityState === "visible" && !this.live.paused) tick();
      }, 1_000);
    }
  }

  // Does something that an admin asked for; an error becomes a sentence.
  async act(action) {
    try {
      await action();
      this.alert.show("");
    } catch (error) {
      this.alert.show(error.message);
      return;
    }
    await this.live.now();
  }

  end() {
    clearInterval(this.#clock);
    this.live?.end();
  }

  #togglePause() {
    this.live.paused = !this.live.paused;
    setText(this.#pause, this.live.paused ? "Go on" : "Pause");
  }

  #show(state) {
    const now = moment(serverNow(), serverNow());
    if (state.kind === "live") {
      setText(this.#state, `Live · ${now}`);
      this.#clearFailure();
    } else if (state.kind === "paused") {
      setText(this.#state, `Paused · ${now}`);
    } else {
      setText(this.#state, `Not live · next try in ${count(Math.round(state.pause / 1000), "second")}`);
      this.failure = state.error.message;
      this.alert.show(this.failure);
    }
    this.#state.dataset.kind = state.kind;
  }

  #clearFailure() {
    if (this.failure && this.alert.element.textContent === this.failure) this.alert.show("");
    this.failure = null;
  }
}

// A part of a view, with a heading that may get the focus.
export function section(title, ...content) {
  const heading = h("h2", { tabindex: "-1" }, title);
  const id = `section-${title.toLowerCase().replaceAll(/[^a-z]+/g, "-")}`;
  heading.id = id;
  const element = h("section", { "aria-labelledby": id }, heading, ...content);
  return { element, heading };
}
