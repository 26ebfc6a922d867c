// SPDX-License-Identifier: AGPL-3.0-or-later
// Plain words for numbers, times and reasons. No document, no network.

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;
const LONGEST = 200;
const numbers = new Intl.NumberFormat("en");

export function number(value) {
  return numbers.format(value);
}

export function count(value, one, many = `${one}s`) {
  return `${number(value)} ${value === 1 ? one : many}`;
}

// A text of somebody else's, of bounded length, with the characters spelled out that are not to
// be seen or that turn others around.
export function foreign(text, longest = LONGEST) {
  const characters = [...text];
  const shown = characters.slice(0, longest).map((character) =>
    /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u.test(character) && character !== "\u200d"
      ? `\\u{${character.codePointAt(0).toString(16)}}`
      : character,
  );
  return shown.join("") + (characters.length > longest ? "…" : "");
}

export function roomName(room) {
  return foreign(room.name ?? room.canonical_alias ?? room.room_id);
}

export function serverOf(userId) {
  return userId.slice(userId.indexOf(":") + 1);
}

// How much time is left, to the second.
export function left(ms) {
  if (ms <= 0) return "expiring";
  const seconds = Math.ceil(ms / 1000);
  const rest = String(seconds % 60).padStart(2, "0");
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${rest} s`;
}

// How long something has been so, roughly.
export function duration(ms) {
  if (ms < MINUTE_MS) return count(Math.max(0, Math.round(ms / 1000)), "second");
  if (ms < 2 * HOUR_MS) return count(Math.round(ms / MINUTE_MS), "minute");
  if (ms < 2 * DAY_MS) return count(Math.round(ms / HOUR_MS), "hour");
  return count(Math.round(ms / DAY_MS), "day");
}

// A moment, with its date unless it is today.
export function moment(ts, nowTs) {
  const date = new Date(ts);
  // Far beyond what a calendar knows, an API may still take it.
  if (Number.isNaN(date.getTime())) return "the far future";
  const isToday = date.toDateString() === new Date(nowTs).toDateString();
  const time = Math.abs(ts - nowTs) < 2 * MINUTE_MS ? "medium" : "short";
  return new Intl.DateTimeFormat(
    undefined,
    isToday ? { timeStyle: time } : { dateStyle: "medium", timeStyle: "short" },
  ).format(date);
}

const HELD_IN_SHORT = {
  soft_failed: "not allowed by the room",
  refused: "refused",
  switched_off: "switched off",
  over_rate: "over the rate",
  server_blocked: "server blocked",
  user_blocked: "user blocked",
};

const HELD = {
  soft_failed:
    "The room’s current state does not allow it, for example because its sender was banned. " +
    "It is delivered once the state allows it.",
  refused: "A policy server or a spam checker refused it. It stays held.",
  switched_off: "Sticky events are off in this room. It is delivered once they are switched on.",
  over_rate:
    "Its server sends more sticky events into this room than the configuration allows. " +
    "It is delivered as the rate allows.",
  server_blocked: "Its server is blocked here. It is delivered when the block ends.",
  user_blocked: "Its sender is blocked here. It is delivered when the block ends.",
};

export function heldInShort(reason) {
  return HELD_IN_SHORT[reason] ?? reason;
}

export function heldReason(reason) {
  return HELD[reason] ?? `It is held for a reason that this page does not know: ${reason}.`;
}

export function heldCounts(held) {
  return Object.entries(held).map(([reason, value]) => `${number(value)} ${heldInShort(reason)}`);
}

const DECIDED = {
  admin: "an admin of this server",
  room: "the room’s own settings",
  default: "this server’s configuration",
};

export function decidedBy(who) {
  return DECIDED[who] ?? who;
}

const DECIDED_IN_SHORT = { admin: "by an admin", room: "by the room", default: "by default" };

export function decidedInShort(who) {
  return DECIDED_IN_SHORT[who] ?? who;
}

const BY_DEFAULT = {
  all: "on in all rooms",
  private_rooms: "on in rooms that not everybody may join",
  none: "off in all rooms",
};

export function byDefault(value) {
  return BY_DEFAULT[value] ?? value;
}

// What events of a type say, for the types that are known to need the words.
const TYPES = {
  "m.rtc.member": "Call membership",
  "org.matrix.msc4143.rtc.member": "Call membership",
  "m.room.encrypted": "Encrypted",
  "m.room.message": "Message",
};

export function typeInWords(type) {
  return TYPES[type] ?? null;
}

// One of "good", "owed", "unreachable", and what to say of it.
export function serverState(server, nowTs) {
  const lines = [];
  if (server.owed > 0) {
    const events = count(server.owed, "event");
    lines.push(
      server.reason === "fresh"
        ? `${events} just now, on the way.`
        : `${events} owed, the oldest for ${duration(server.oldest_owed_ms)}.`,
    );
    if (server.obstacle) lines.push(`Last try: ${foreign(server.obstacle)}.`);
  }
  if (server.failing_since_ts !== null) {
    const since = moment(server.failing_since_ts, nowTs);
    const forMs = Math.max(0, nowTs - server.failing_since_ts);
    lines.unshift(`Since ${since}, for ${duration(forMs)}.`);
  }
  if (server.owed > 0 && server.retry_ts !== null && server.retry_ts > nowTs) {
    lines.push(`Next try at ${moment(server.retry_ts, nowTs)}.`);
  }
  if (server.failing_since_ts !== null) return { kind: "unreachable", label: "Unreachable", lines };
  if (server.owed > 0) return { kind: "owed", label: "Owed", lines };
  return { kind: "good", label: "Up to date", lines: ["It is owed nothing."] };
}
