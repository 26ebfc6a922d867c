// SPDX-License-Identifier: AGPL-3.0-or-later
// Makes elements. Text only ever becomes text: nothing here reads markup.

// Said once more, since a style that makes blocks of rows takes them away.
const ROLES = { table: "table", thead: "rowgroup", tbody: "rowgroup", tr: "row", td: "cell" };
const HEADING_ROLES = { col: "columnheader", row: "rowheader" };

// h("a", {class: "x", href: "#/", on: {click: f}}, "text", element, null)
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const role = ROLES[tag] ?? (tag === "th" ? HEADING_ROLES[properties.scope] : undefined);
  if (role !== undefined) element.setAttribute("role", role);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) {
        element.addEventListener(event, listener);
      }
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Sets a text, and leaves the document alone if it is there already.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setChildren(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null));
}

let said = 0;

// Tells everybody, those who listen too, that something was done.
export function say(text) {
  const place = document.getElementById("said");
  const turn = ++said;
  place.textContent = text;
  setTimeout(() => {
    if (turn === said) place.textContent = "";
  }, 8_000);
}

let ids = 0;

export function newId() {
  return `id${++ids}`;
}

// A list whose elements stay the same ones while their items change, so that whoever has the
// focus in one, or has opened one, keeps it.
export class KeyedList {
  #rows = new Map();

  // make(item) returns {element, update(item), tick()}; tick is optional.
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
  }

  // Returns whether the element that had the focus is gone.
  show(items) {
    const had = this.parent.contains(document.activeElement);
    const rows = new Map();
    for (const item of items) {
      const key = this.keyOf(item);
      const row = this.#rows.get(key) ?? this.make(item);
      row.update(item);
      rows.set(key, row);
    }
    for (const [key, row] of this.#rows) if (!rows.has(key)) row.element.remove();
    let next = this.parent.firstElementChild;
    for (const row of rows.values()) {
      if (row.element === next) next = next.nextElementSibling;
      else this.parent.insertBefore(row.element, next);
    }
    this.#rows = rows;
    return had && !this.parent.contains(document.activeElement);
  }

  tick() {
    for (const row of this.#rows.values()) row.tick?.();
  }
}

// A table with a caption and headings. Columns are [text, class].
export function table(caption, columns) {
  const body = h("tbody");
  const element = h(
    "table",
    {},
    h("caption", { class: "hidden-text" }, caption),
    h(
      "thead",
      {},
      h("tr", {}, ...columns.map(([text, style]) => h("th", { scope: "col", class: style }, text))),
    ),
    body,
  );
  return { element, body };
}

// A message that is read out at once, and takes no place while there is none.
export function alertPlace() {
  const element = h("div", { role: "alert", class: "alert", hidden: true });
  return {
    element,
    show(text) {
      setText(element, text);
      element.hidden = text === "";
    },
  };
}

// Shows some of these elements: [element, whether]. If the one that had the focus goes, another one
// gets it, or the heading that is given.
export function showSome(elements, heading = null) {
  const focused = document.activeElement;
  for (const [element, isShown] of elements) element.hidden = !isShown;
  if (!elements.some(([element]) => element === focused && element.hidden)) return;
  const shown = elements.find(([, isShown]) => isShown);
  (heading ?? shown?.[0])?.focus();
}

export function button(text, onClick, properties = {}) {
  return h("button", { type: "button", ...properties, on: { click: onClick } }, text);
}
