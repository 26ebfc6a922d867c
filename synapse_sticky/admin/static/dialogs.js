// SPDX-License-Identifier: AGPL-3.0-or-later
// Dialogs, and the decisions that are made in them.

import { endBackOff, path, put, retry, serverNow } from "./api.js";
import { alertPlace, button, h, newId, say } from "./dom.js";
import { count, foreign, moment } from "./words.js";

const HOUR_MS = 3_600_000;
const ENDS = [
  ["never", "When somebody ends it"],
  [String(HOUR_MS), "In an hour"],
  [String(24 * HOUR_MS), "In a day"],
  [String(7 * 24 * HOUR_MS), "In a week"],
  ["at", "At a time of your choice"],
];

const WHO_READS = {
  user: "The user is told it whenever an event is refused.",
  server: "For the admins of this server.",
  null: "A user is told it whenever an event is refused. For a server, only admins see it.",
};

// Shows a dialog. submit() does what was asked for; an error of it is shown in the dialog, which
// stays open. Resolves to whether it was done.
function open(title, content, action, submit, { danger = false } = {}) {
  const id = newId();
  const problem = alertPlace();
  const go = h("button", { type: "submit", class: danger ? "danger" : "primary" }, action);
  const form = h(
    "form",
    {},
    h("h2", { id }, title),
    ...content,
    problem.element,
    h("div", { class: "actions" }, button("Cancel", () => dialog.close()), go),
  );
  const dialog = h("dialog", { "aria-labelledby": id }, form);
  return new Promise((resolve) => {
    let isDone = false;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (go.disabled) return;
      go.disabled = true;
      try {
        await submit();
        isDone = true;
        dialog.close();
      } catch (error) {
        problem.show(error.message);
      } finally {
        go.disabled = false;
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(isDone);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function field(label, input, hint = null) {
  const id = newId();
  input.id = id;
  const about = hint === null ? null : h("p", { class: "hint", id: `${id}-hint` }, hint);
  if (about) input.setAttribute("aria-describedby", about.id);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, about);
}

// Blocks a user of this server or another server; which one is asked if it is not given.
export function blockDialog(kind = null, subject = null) {
  const who = h("input", {
    type: "text",
    required: true,
    maxlength: "255",
    autocomplete: "off",
    autocapitalize: "off",
    spellcheck: "false",
  });
  const reason = h("textarea", { rows: "2", maxlength: "1000" });
  const end = h("select", {}, ...ENDS.map(([value, text]) => h("option", { value }, text)));
  const at = h("input", { type: "datetime-local" });
  const atField = field("Ends at", at);
  atField.hidden = true;
  end.addEventListener("change", () => {
    atField.hidden = end.value !== "at";
    at.required = end.value === "at";
  });
  const content = [
    subject === null
      ? field("User or server", who, "For example @mallory:example.com or matrix.example.org.")
      : h("p", { class: "subject" }, h("bdi", {}, foreign(subject, 255))),
    h("p", { class: "hint" }, consequences(kind)),
    field("Reason (optional)", reason, WHO_READS[kind]),
    field("The block ends", end),
    atField,
  ];
  return open(
    { user: "Block this user?", server: "Block this server?" }[kind] ?? "Block a user or a server",
    content,
    "Block",
    async () => {
      const name = subject ?? who.value.trim();
      const of = kind ?? (name.startsWith("@") ? "user" : "server");
      await put(settingsOf(of, name), {
        enabled: false,
        reason: reason.value.trim() === "" ? null : reason.value,
        until_ts: untilTs(end.value, at.value),
      });
      say(`${foreign(name)} is blocked.`);
    },
    { danger: true },
  );
}

function consequences(kind) {
  const user = "A blocked user of this server cannot send sticky events; those there are get held.";
  const server = "The sticky events of a blocked server are held.";
  const both = "Ordinary events are not affected.";
  if (kind === "user") return `${user} ${both}`;
  if (kind === "server") return `${server} ${both}`;
  return `${user} ${server} ${both}`;
}

function untilTs(end, at) {
  if (end === "never") return null;
  if (end === "at") return new Date(at).getTime();
  return Math.round(serverNow()) + Number(end);
}

export async function unblock(kind, subject) {
  await put(settingsOf(kind, subject), { enabled: null });
  say(`${foreign(subject)} is not blocked any more.`);
}

function settingsOf(kind, subject) {
  return path(`${kind}s`, subject, "settings");
}

const SWITCHES = {
  true: {
    title: "Switch sticky events on here?",
    text: "They are then on in this room, whatever the room’s own settings and the configuration say. Events that are held for this and have not expired are delivered.",
    action: "Switch on",
    said: "Sticky events are on in this room.",
  },
  false: {
    title: "Switch sticky events off here?",
    text: "Users of this server then cannot send sticky events to this room, and those there are get held. Calls that need them show no participants.",
    action: "Switch off",
    said: "Sticky events are off in this room.",
  },
  null: {
    title: "Leave it to the room?",
    text: "The room’s own settings then count, or this server’s configuration if it has none.",
    action: "Leave it to the room",
    said: "The room and the configuration decide now.",
  },
};

// Decides whether sticky events are on in a room: true, false, or null to leave it to the room.
export function switchDialog(roomId, enabled) {
  const { title, text, action, said } = SWITCHES[enabled];
  return open(
    title,
    [h("p", {}, text)],
    action,
    async () => {
      await put(path("rooms", roomId, "settings"), { enabled });
      say(said);
    },
    { danger: enabled === false },
  );
}

export function switchAction(enabled) {
  return SWITCHES[enabled].action;
}

// Asks for a retry. While Synapse waits because the server did not answer, the admin may end that.
export async function retryServer(serverName) {
  const ask = async () => {
    const { owed } = await retry(serverName);
    const what = owed === 0 ? "It is owed nothing." : `It is sent the ${count(owed, "event")} it is owed.`;
    say(`${foreign(serverName)} is tried now. ${what}`);
  };
  try {
    await ask();
  } catch (error) {
    if (error.status !== 409) throw error;
    const until = error.retryTs === null ? "" : ` until ${moment(error.retryTs, serverNow())}`;
    const text =
      `${foreign(serverName)} did not answer, so Synapse leaves it alone${until}. ` +
      "Synapse can try again now, with everything it has for this server.";
    await open("End the wait?", [h("p", {}, text)], "Try now", async () => {
      await endBackOff(serverName);
      await ask();
    });
  }
}
