// SPDX-License-Identifier: AGPL-3.0-or-later
// Parts of rows that several sections show.

import { serverNow } from "./api.js";
import { button, h, KeyedList, setChildren, setText, showSome, table } from "./dom.js";
import { blockDialog, retryServer, unblock } from "./dialogs.js";
import { foreign, left, number, serverState } from "./words.js";

const HOUR_MS = 3_600_000;

// A bar and a text for the time that is left, of the hour that sticky events last at most.
export function timeLeft() {
  const fill = h("span", { class: "fill" });
  const text = h("span", { class: "left-text" });
  const element = h(
    "div",
    { class: "left" },
    text,
    h("span", { class: "track", "aria-hidden": "true" }, fill),
  );
  let endsAt = 0;
  const tick = () => {
    const ms = endsAt - performance.now();
    setText(text, left(ms));
    fill.style.width = `${Math.max(0, Math.min(100, (ms / HOUR_MS) * 100)).toFixed(1)}%`;
    element.classList.toggle("soon", ms < 60_000);
  };
  return {
    element,
    tick,
    set(remainingMs) {
      endsAt = performance.now() + remainingMs;
      tick();
    },
  };
}

// The servers in a room, or in all rooms, each with its state and what can be done about it.
export function serverList(caption, view) {
  const shown = table(caption, [
    ["Server", ""],
    ["State", ""],
    ["Actions", "actions-column"],
  ]);
  shown.element.classList.add("servers");
  const list = new KeyedList(shown.body, (server) => server.server_name, () => serverRow(view));
  return { element: shown.element, list };
}

function serverRow(view) {
  let server;
  const name = h("bdi", { class: "mono" });
  const blocked = h("span", { class: "badge unreachable" }, "Blocked");
  const badge = h("span", { class: "badge" });
  const lines = h("div", { class: "lines" });
  const about = (text) => () => `${text} ${foreign(server.server_name)}`;
  const retry = labelled("Retry", about("Retry"), () =>
    view.act(() => retryServer(server.server_name)),
  );
  const block = labelled("Block", about("Block"), async () => {
    if (await blockDialog("server", server.server_name)) await view.live.now();
  });
  const end = labelled("Unblock", about("Unblock"), () =>
    view.act(() => unblock("server", server.server_name)),
  );
  const element = h(
    "tr",
    {},
    h("th", { scope: "row" }, name, " ", blocked),
    h("td", {}, badge, lines),
    h("td", { class: "actions-column" }, h("div", { class: "row-actions" }, retry, block, end)),
  );
  const tick = () => {
    const state = serverState(server, serverNow());
    setText(badge, state.label);
    badge.className = `badge ${state.kind}`;
    const text = state.lines.join(" ");
    setText(lines, text);
  };
  return {
    element,
    tick,
    update(newer) {
      server = newer;
      setText(name, foreign(server.server_name, 255));
      blocked.hidden = !server.blocked;
      showSome([
        [retry, server.owed > 0 || server.failing_since_ts !== null],
        [block, !server.blocked],
        [end, server.blocked],
      ]);
      for (const each of [retry, block, end]) each.relabel();
      tick();
    },
  };
}

// A button whose name says more to those who do not see what it stands beside.
export function labelled(text, name, onClick) {
  const element = button(text, onClick, { class: "small" });
  element.relabel = () => element.setAttribute("aria-label", name());
  return element;
}

// "Show more", as long as there is more than is shown, up to what the API gives at a time.
export function moreButton(view) {
  const limits = { step: 100, limit: 100, longest: 1000 };
  const text = h("p", { class: "more-text" });
  const more = button("Show more", () => {
    limits.limit = Math.min(limits.limit + limits.step, limits.longest);
    view.act(() => {});
  });
  const element = h("div", { class: "more", hidden: true }, text, more);
  return {
    element,
    get limit() {
      return limits.limit;
    },
    show(shown, total) {
      element.hidden = shown >= total;
      more.hidden = limits.limit >= limits.longest;
      setText(text, `The first ${number(shown)} of ${number(total)} are shown.`);
    },
  };
}

export function badges(parent, texts, kind) {
  if (parent.dataset.texts === JSON.stringify(texts)) return;
  parent.dataset.texts = JSON.stringify(texts);
  setChildren(parent, ...texts.map((text) => h("span", { class: `badge ${kind}` }, text)));
}
