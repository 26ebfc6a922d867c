// SPDX-License-Identifier: AGPL-3.0-or-later
// The users and servers that are blocked.

import { get, serverNow } from "./api.js";
import { blockDialog, unblock } from "./dialogs.js";
import { button, h, KeyedList, setText, table } from "./dom.js";
import { labelled, moreButton } from "./rows.js";
import { foreign, moment } from "./words.js";
import { View } from "./view.js";

const INTERVAL_MS = 10_000;

export function blocksView() {
  const view = new View("Blocks");
  const shown = table("Blocked users and servers", [
    ["Blocked", ""],
    ["Reason", ""],
    ["Ends", ""],
    ["Actions", "actions-column"],
  ]);
  const list = new KeyedList(
    shown.body,
    (block) => `${block.kind} ${block.subject}`,
    () => blockRow(view),
  );
  const empty = h("p", { class: "empty", hidden: true }, "Nobody is blocked.");
  const more = moreButton(view);
  const add = button(
    "Block a user or a server",
    async () => {
      if (await blockDialog()) await view.live.now();
    },
    { class: "primary" },
  );
  view.element.append(
    h("p", {}, add),
    h("div", { class: "panel" }, shown.element, empty, more.element),
  );
  view.start(INTERVAL_MS, async (signal) => {
    const { blocks, total } = await get("blocks", { limit: more.limit }, signal);
    if (list.show(blocks)) view.heading.focus();
    shown.element.hidden = total === 0;
    empty.hidden = total > 0;
    more.show(blocks.length, total);
  });
  return view;
}

function blockRow(view) {
  let block;
  const subject = h("bdi", { class: "mono" });
  const kind = h("span", { class: "kind" });
  const reason = h("td", {});
  const end = h("td", {});
  const lift = labelled("Unblock", () => `Unblock ${foreign(block.subject)}`, () =>
    view.act(() => unblock(block.kind, block.subject)),
  );
  const element = h(
    "tr",
    {},
    h("th", { scope: "row" }, subject, " ", kind),
    reason,
    end,
    h("td", { class: "actions-column" }, h("div", { class: "row-actions" }, lift)),
  );
  return {
    element,
    update(newer) {
      block = newer;
      setText(subject, foreign(block.subject, 255));
      setText(kind, block.kind);
      setText(reason, block.reason === null ? "–" : foreign(block.reason, 1000));
      setText(end, block.until_ts === null ? "never by itself" : moment(block.until_ts, serverNow()));
      lift.relabel();
    },
  };
}
