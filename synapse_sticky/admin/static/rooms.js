// SPDX-License-Identifier: AGPL-3.0-or-later
// All rooms with sticky events: search, sort, counts.

import { get } from "./api.js";
import { button, h, KeyedList, newId, setText, table } from "./dom.js";
import { badges } from "./rows.js";
import { byDefault, count, decidedInShort, foreign, heldCounts, number, roomName } from "./words.js";
import { View } from "./view.js";

const INTERVAL_MS = 10_000;
const PAGE = 50;
const COLUMNS = [
  ["name", "Room", "", "f"],
  ["live", "Live", "number", "b"],
  ["held", "Held", "number", "b"],
  ["owed", "Owed", "number", "b"],
  [null, "Switch", ""],
];

// As it was left, for whoever comes back from a room.
const chosen = { search: "", order: "live", dir: "b", from: 0 };

export function roomsView() {
  const view = new View("Rooms");
  const summary = summaryOf();
  const shown = table("Rooms with sticky events", []);
  shown.element.classList.add("rooms");
  const heads = headings(() => view.act(() => {}));
  shown.element.tHead.rows[0].append(...heads.elements);
  const list = new KeyedList(shown.body, (room) => room.room_id, roomRow);
  const empty = h("p", { class: "empty", hidden: true });
  const open = h("p", { hidden: true });
  const pages = pager(() => view.act(() => {}));
  view.element.append(
    summary.element,
    searchForm(() => view.act(() => {})),
    h("div", { class: "panel" }, shown.element, empty, open),
    pages.element,
  );
  view.start(INTERVAL_MS, async (signal) => {
    const ask = () =>
      get(
        "rooms",
        {
          search_term: chosen.search,
          order_by: chosen.order,
          dir: chosen.dir,
          from: chosen.from,
          limit: PAGE,
        },
        signal,
      );
    let [status, rooms] = await Promise.all([get("status", {}, signal), ask()]);
    if (rooms.rooms.length === 0 && chosen.from > 0) {
      // The last page has expired.
      chosen.from = Math.floor(Math.max(0, rooms.total - 1) / PAGE) * PAGE;
      rooms = await ask();
    }
    summary.show(status);
    heads.show();
    if (list.show(rooms.rooms)) view.heading.focus();
    shown.element.hidden = rooms.total === 0;
    pages.show(rooms);
    empty.hidden = rooms.rooms.length > 0;
    setText(
      empty,
      chosen.search === ""
        ? "No room has sticky events right now. They appear here as soon as somebody sends one."
        : "No room with sticky events has this in its name, alias or ID.",
    );
    showOpen(open, chosen.search, rooms.total);
  });
  return view;
}

// A room without sticky events is in no list, but may be looked at by its ID.
function showOpen(place, search, total) {
  const isId = /^!.+/.test(search);
  place.hidden = !isId || total > 0;
  if (!place.hidden) place.replaceChildren(h("a", { href: roomAddress(search) }, "Open this room"));
}

export function roomAddress(roomId) {
  return `#/rooms/${encodeURIComponent(roomId)}`;
}

function summaryOf() {
  const figure = (label) => {
    const value = h("dd", { class: "value" }, "–");
    const more = h("dd", { class: "about" });
    return { element: h("div", {}, h("dt", {}, label), value, more), value, more };
  };
  const figures = {
    live: figure("Live"),
    held: figure("Held"),
    owed: figure("Owed"),
    behind: figure("Not noticed yet"),
  };
  const about = h("p", { class: "about-server" });
  const list = h("dl", { class: "figures" }, ...Object.values(figures).map((f) => f.element));
  const element = h("div", { class: "summary" }, list, about);
  return {
    element,
    show(status) {
      const set = (name, value, text) => {
        setText(figures[name].value, number(value));
        setText(figures[name].more, text);
        figures[name].element.classList.toggle("attention", name !== "live" && value > 0);
      };
      const held = Object.values(status.held).reduce((sum, value) => sum + value, 0);
      set("live", status.live, "sticky events that clients get");
      set("held", held, heldCounts(status.held).join(", ") || "none is held back");
      set("owed", status.owed, "deliveries to other servers to come");
      set("behind", status.indexer.behind, `by the process ${status.indexer.instance_name}`);
      setText(
        about,
        `${status.server_name} · sticky events are ${byDefault(status.enabled_by_default)} ` +
          `by default · synapse_sticky ${status.version} on Synapse ${status.synapse_version}`,
      );
    },
  };
}

function searchForm(onChange) {
  const id = newId();
  let timer = null;
  const input = h("input", {
    id,
    type: "search",
    placeholder: "Name, alias or ID",
    autocomplete: "off",
    spellcheck: "false",
    maxlength: "255",
    on: {
      input: () => {
        clearTimeout(timer);
        timer = setTimeout(search, 300);
      },
    },
  });
  const search = () => {
    clearTimeout(timer);
    chosen.search = input.value.trim();
    chosen.from = 0;
    onChange();
  };
  input.value = chosen.search;
  const submit = (event) => {
    event.preventDefault();
    search();
  };
  return h(
    "form",
    { role: "search", class: "search", on: { submit } },
    h("label", { for: id }, "Search rooms"),
    input,
  );
}

function headings(onChange) {
  const elements = COLUMNS.map(([order, text, style, first]) => {
    if (order === null) return h("th", { scope: "col", class: style }, text);
    const sort = button(text, () => {
      chosen.dir = chosen.order === order ? (chosen.dir === "f" ? "b" : "f") : first;
      chosen.order = order;
      chosen.from = 0;
      show();
      onChange();
    });
    sort.className = "sort";
    return h("th", { scope: "col", class: style, "data-order": order }, sort);
  });
  const show = () => {
    for (const head of elements) {
      if (head.dataset.order !== chosen.order) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", chosen.dir === "f" ? "ascending" : "descending");
    }
  };
  show();
  return { elements, show };
}

function pager(onChange) {
  const turn = (pages) => () => {
    chosen.from = Math.max(0, chosen.from + pages * PAGE);
    onChange();
  };
  const text = h("p", {});
  const before = button("Previous", turn(-1));
  const after = button("Next", turn(1));
  const element = h("nav", { class: "pager", "aria-label": "Pages", hidden: true }, before, text, after);
  return {
    element,
    show(rooms) {
      const to = chosen.from + rooms.rooms.length;
      before.disabled = chosen.from === 0;
      after.disabled = rooms.next_token === undefined;
      element.hidden = before.disabled && after.disabled;
      setText(text, `${number(chosen.from + 1)} to ${number(to)} of ${count(rooms.total, "room")}`);
    },
  };
}

function roomRow(first) {
  const link = h("a", { href: roomAddress(first.room_id) });
  const id = h("bdi", { class: "mono id" });
  const [live, held, owed] = ["Live", "Held", "Owed"].map((label) =>
    h("td", { class: "number", "data-label": label }),
  );
  const badge = h("span", {});
  const who = h("span", { class: "who-decided" });
  const element = h(
    "tr",
    {},
    h("th", { scope: "row" }, h("bdi", {}, link), id),
    live,
    held,
    owed,
    h("td", {}, badge, " ", who),
  );
  return {
    element,
    update(room) {
      setText(link, roomName(room));
      setText(id, foreign(room.room_id, 255));
      id.hidden = room.name === null && room.canonical_alias === null;
      const sum = Object.values(room.held).reduce((total, value) => total + value, 0);
      for (const [cell, value] of [
        [live, room.live],
        [held, sum],
        [owed, room.owed],
      ]) {
        setText(cell, number(value));
        cell.classList.toggle("zero", value === 0);
      }
      held.title = heldCounts(room.held).join(", ");
      badges(badge, [room.enabled ? "On" : "Off"], room.enabled ? "good" : "off");
      setText(who, decidedInShort(room.enabled_by));
    },
  };
}
