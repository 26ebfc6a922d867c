// SPDX-License-Identifier: AGPL-3.0-or-later
// One room, live: its map, the events that are held, its servers and its switch.

import { get, path } from "./api.js";
import { blockDialog, switchAction, switchDialog, unblock } from "./dialogs.js";
import { button, h, KeyedList, setText, showSome, table } from "./dom.js";
import { labelled, moreButton, serverList, timeLeft } from "./rows.js";
import {
  count,
  decidedBy,
  foreign,
  heldInShort,
  heldReason,
  number,
  roomName,
  serverOf,
  typeInWords,
} from "./words.js";
import { section, View } from "./view.js";

const INTERVAL_MS = 5_000;

export function roomView(roomId, ownServer) {
  const alias = h("bdi", { class: "mono alias" });
  const id = h("bdi", { class: "mono id" }, foreign(roomId, 255));
  const view = new View("Room", h("p", { class: "beside" }, alias, id));
  view.element.prepend(
    h("p", { class: "back" }, h("a", { href: "#/rooms" }, "All rooms")),
  );
  const parts = [
    switchPart(view, roomId),
    mapPart(view, ownServer),
    heldPart(view, ownServer),
    serversPart(view),
  ];
  const content = h("div", { class: "parts", hidden: true }, ...parts.map((part) => part.element));
  view.element.append(content);
  const [, map, held, servers] = parts;
  view.start(
    INTERVAL_MS,
    async (signal) => {
      const [room, entries, all] = await Promise.all([
        get(path("rooms", roomId), { held: true, limit: held.limit }, signal),
        get(path("rooms", roomId, "map"), { limit: map.limit }, signal),
        get(path("rooms", roomId, "servers"), { all: true, limit: servers.limit }, signal),
      ]);
      setText(view.heading, roomName(room));
      document.title = `${roomName(room)} · Sticky events`;
      setText(id, foreign(room.room_id, 255));
      setText(alias, foreign(room.canonical_alias ?? ""));
      alias.hidden = room.name === null || room.canonical_alias === null;
      id.hidden = room.name === null && room.canonical_alias === null;
      content.hidden = false;
      for (const part of parts) part.show(room, entries, all);
    },
    () => parts.forEach((part) => part.tick?.()),
  );
  return view;
}

function switchPart(view, roomId) {
  const state = h("span", { class: "badge" });
  const text = h("span", {});
  const decide = (enabled) => async () => {
    if (await switchDialog(roomId, enabled)) await view.live.now();
  };
  const choices = [true, false, null].map((enabled) => [
    enabled,
    button(switchAction(enabled), decide(enabled), { class: "small" }),
  ]);
  const { element, heading } = section(
    "Switch",
    h(
      "div",
      { class: "panel switch" },
      h("p", {}, state, " ", text),
      h("div", { class: "row-actions" }, ...choices.map(([, choice]) => choice)),
    ),
  );
  return {
    element,
    show(room) {
      setText(state, room.enabled ? "On" : "Off");
      state.className = `badge ${room.enabled ? "good" : "off"}`;
      const verb = room.enabled ? "on" : "off";
      setText(text, `Sticky events are ${verb} here. Decided by ${decidedBy(room.enabled_by)}.`);
      const isDecided = room.enabled_by === "admin";
      showSome(
        choices.map(([enabled, choice]) => [
          choice,
          enabled === null ? isDecided : enabled !== room.enabled,
        ]),
        heading,
      );
    },
  };
}

function mapPart(view, ownServer) {
  const shown = table("Current values of the room’s sticky events", [
    ["Sender", ""],
    ["Event", ""],
    ["Time left", "left-column"],
    ["Actions", "actions-column"],
  ]);
  const list = new KeyedList(shown.body, (entry) => entry.event_id, () => entryRow(view, ownServer));
  const empty = h("p", { class: "empty" });
  const more = moreButton(view);
  const { element, heading } = section(
    "Now",
    h(
      "p",
      { class: "hint" },
      "What clients make of the room’s sticky events: for example who is in a call.",
    ),
    h("div", { class: "panel" }, shown.element, empty, more.element),
  );
  return {
    element,
    get limit() {
      return more.limit;
    },
    tick: () => list.tick(),
    show(room, map) {
      if (list.show(map.entries)) heading.focus();
      setText(heading, `Now (${number(map.total)})`);
      shown.element.hidden = map.total === 0;
      empty.hidden = map.total > 0;
      setText(empty, whyEmpty(room));
      more.show(map.entries.length, map.total);
    },
  };
}

function whyEmpty(room) {
  if (room.live > 0) {
    return (
      `Nothing. The room has ${count(room.live, "sticky event")}, ` +
      "which only say that a value is gone, or were redacted."
    );
  }
  if (!room.enabled) return "Nothing: sticky events are off in this room.";
  if (room.total > 0) return "Nothing: every sticky event of this room is held.";
  return "Nothing: nobody has sent a sticky event here that has not expired.";
}

function whoCell() {
  const who = h("bdi", { class: "mono" });
  const element = h("th", { scope: "row" }, who);
  return { element, set: (sender) => setText(who, foreign(sender, 255)) };
}

function typeCell() {
  const words = h("span", { class: "type-words" });
  const type = h("bdi", { class: "mono type" });
  return {
    elements: [words, " ", type],
    set(text) {
      const known = text === null ? "Purged by Synapse" : typeInWords(text);
      setText(words, known ?? "");
      words.hidden = known === null;
      setText(type, text === null ? "" : foreign(text));
    },
  };
}

// Blocks the sender, who is a user of this server, or their server.
function senderActions(view, ownServer) {
  let kind;
  let subject;
  const block = labelled("Block", () => `Block ${foreign(subject)}`, async () => {
    if (await blockDialog(kind, subject)) await view.live.now();
  });
  const end = labelled("Unblock", () => `Unblock ${foreign(subject)}`, () =>
    view.act(() => unblock(kind, subject)),
  );
  const element = h(
    "td",
    { class: "actions-column" },
    h("div", { class: "row-actions" }, block, end),
  );
  return {
    element,
    set(sender, isBlocked = false) {
      const server = serverOf(sender);
      kind = server === ownServer ? "user" : "server";
      subject = kind === "user" ? sender : server;
      setText(block, kind === "user" ? "Block user" : "Block server");
      showSome([
        [block, !isBlocked],
        [end, isBlocked],
      ]);
      block.relabel();
      end.relabel();
    },
  };
}

function entryRow(view, ownServer) {
  const who = whoCell();
  const type = typeCell();
  const key = h("span", { class: "key" });
  const content = h("pre", { tabindex: "0", role: "region", "aria-label": "Content" });
  const details = h("details", {}, h("summary", {}, "Content"), content);
  const time = timeLeft();
  const actions = senderActions(view, ownServer);
  const element = h(
    "tr",
    {},
    who.element,
    h("td", {}, ...type.elements, h("div", { class: "beside" }, key, details)),
    h("td", { class: "left-column" }, time.element),
    actions.element,
  );
  return {
    element,
    tick: time.tick,
    update(entry) {
      who.set(entry.sender);
      type.set(entry.type);
      setText(key, keyInWords(entry));
      details.hidden = entry.opaque;
      setText(content, entry.opaque ? "" : shownContent(entry.content));
      time.set(entry.remaining_ms);
      actions.set(entry.sender);
    },
  };
}

function keyInWords(entry) {
  if (entry.opaque) return "Its type and key are not known here.";
  return entry.sticky_key === null ? "No key: it stands alone." : `Key ${foreign(entry.sticky_key)}`;
}

function shownContent(content) {
  const lines = JSON.stringify(content, null, 2).split("\n");
  return lines.slice(0, 500).map((line) => foreign(line, 2_000)).join("\n");
}

function heldPart(view, ownServer) {
  const shown = table("Sticky events that are held", [
    ["Sender", ""],
    ["Event and why it is held", ""],
    ["Time left", "left-column"],
    ["Actions", "actions-column"],
  ]);
  const list = new KeyedList(shown.body, (event) => event.event_id, () => heldRow(view, ownServer));
  const empty = h("p", { class: "empty" }, "Nothing is held back.");
  const more = moreButton(view);
  const { element, heading } = section(
    "Held",
    h("div", { class: "panel" }, shown.element, empty, more.element),
  );
  return {
    element,
    get limit() {
      return more.limit;
    },
    tick: () => list.tick(),
    show(room) {
      if (list.show(room.events)) heading.focus();
      setText(heading, `Held (${number(room.total)})`);
      shown.element.hidden = room.total === 0;
      empty.hidden = room.total > 0;
      more.show(room.events.length, room.total);
    },
  };
}

function heldRow(view, ownServer) {
  const who = whoCell();
  const type = typeCell();
  const reasons = h("ul", { class: "reasons" });
  const list = new KeyedList(reasons, (reason) => reason, reasonItem);
  const time = timeLeft();
  const actions = senderActions(view, ownServer);
  const element = h(
    "tr",
    {},
    who.element,
    h("td", {}, ...type.elements, reasons),
    h("td", { class: "left-column" }, time.element),
    actions.element,
  );
  return {
    element,
    tick: time.tick,
    update(event) {
      who.set(event.sender);
      type.set(event.type);
      list.show(event.held_reasons);
      time.set(event.remaining_ms);
      const isBlocked = ["user_blocked", "server_blocked"].some((reason) =>
        event.held_reasons.includes(reason),
      );
      actions.set(event.sender, isBlocked);
    },
  };
}

function reasonItem(reason) {
  const element = h(
    "li",
    {},
    h("span", { class: "badge owed" }, heldInShort(reason)),
    " ",
    heldReason(reason),
  );
  return { element, update: () => {} };
}

function serversPart(view) {
  const shown = serverList("Other servers in the room", view);
  const empty = h("p", { class: "empty" }, "No other server is in this room.");
  const more = moreButton(view);
  const { element, heading } = section(
    "Servers",
    h("div", { class: "panel" }, shown.element, empty, more.element),
  );
  return {
    element,
    get limit() {
      return more.limit;
    },
    tick: () => shown.list.tick(),
    show(room, map, servers) {
      if (shown.list.show(servers.servers)) heading.focus();
      setText(heading, `Servers (${number(servers.total)})`);
      shown.element.hidden = servers.total === 0;
      empty.hidden = servers.total > 0;
      more.show(servers.servers.length, servers.total);
    },
  };
}
