// SPDX-License-Identifier: AGPL-3.0-or-later
// The servers that are owed events in any room.

import { get } from "./api.js";
import { h } from "./dom.js";
import { moreButton, serverList } from "./rows.js";
import { View } from "./view.js";

const INTERVAL_MS = 10_000;

export function serversView() {
  const view = new View("Servers");
  const shown = serverList("Servers that are owed sticky events", view);
  const empty = h("p", { class: "empty", hidden: true }, "Every server has what it is owed.");
  const more = moreButton(view);
  view.element.append(
    h(
      "p",
      { class: "hint" },
      "The servers that have not received sticky events of this server’s users, in all rooms. " +
        "A room shows all of its servers.",
    ),
    h("div", { class: "panel" }, shown.element, empty, more.element),
  );
  view.start(
    INTERVAL_MS,
    async (signal) => {
      const { servers, total } = await get("servers", { limit: more.limit }, signal);
      if (shown.list.show(servers)) view.heading.focus();
      shown.element.hidden = total === 0;
      empty.hidden = total > 0;
      more.show(servers.length, total);
    },
    () => shown.list.tick(),
  );
  return view;
}
