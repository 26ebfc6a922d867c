// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Plays histories into matrix-js-sdk's store of sticky events.
//
// Each line of the input is a history in JSON: its time of beginning, and steps. A step has a time
// (`now_ts`), and may have an event to add (`add`), the ID of an encrypted event with what it says
// in clear (`decrypt`), or the ID of an event that was redacted (`redact`). For each history there
// is a line of output: after each step, the values in the store.

import { mock } from "node:test";
import { createInterface } from "node:readline";

// The SDK logs to the console.
for (const method of ["trace", "debug", "log", "info", "warn", "error"]) console[method] = () => {};

const { RoomStickyEventsStore } = await import("matrix-js-sdk/lib/models/room-sticky-events.js");
const { MatrixEvent } = await import("matrix-js-sdk/lib/models/event.js");

function values(store) {
    return [...store.getStickyEvents()].map((event) => [
        event.getSender(),
        event.getType(),
        event.getContent(),
        event.getId(),
    ]);
}

async function play({ start_ts, steps }) {
    // The SDK asks for the time itself, and drops what expires by a timer.
    mock.timers.enable({ apis: ["setTimeout", "Date"], now: start_ts });
    const store = new RoomStickyEventsStore();
    const encrypted = new Map();
    const outcome = [];
    for (const { now_ts, add, decrypt, redact } of steps) {
        mock.timers.tick(now_ts - Date.now());
        if (add) {
            const event = new MatrixEvent(add);
            if (event.isEncrypted()) encrypted.set(event.getId(), event);
            store.addStickyEvents([event]);
        }
        if (decrypt) {
            const clearEvent = { type: decrypt.type, content: decrypt.content };
            await encrypted
                .get(decrypt.event_id)
                .attemptDecryption({ decryptEvent: async () => ({ clearEvent }) });
        }
        if (redact) store.handleRedaction(redact);
        outcome.push(values(store));
    }
    mock.timers.reset();
    return outcome;
}

for await (const line of createInterface({ input: process.stdin })) {
    process.stdout.write(JSON.stringify(await play(JSON.parse(line))) + "\n");
}
